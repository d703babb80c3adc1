# bash completion for fallback_proxy(8)                                       -*- shell-script -*-
_fallback_proxy() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
  case $prev in
    --config | --control) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")) ;;
    *)
      COMPREPLY=($(compgen -W '--config --control --take-over --status --json --cleanup --help --version' -- "$cur"))
      ;;
  esac
}
complete -F _fallback_proxy fallback_proxy
