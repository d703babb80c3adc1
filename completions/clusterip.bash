# bash completion for clusterip(1)                                            -*- shell-script -*-
_clusterip() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb= i
  local verbs='check probe load unload run status trace resolve'
  for ((i = 1; i < COMP_CWORD; ++i)); do
    case ${COMP_WORDS[i]} in
      --plugin) ((++i)) ;;
      -*) ;;
      *) verb=${COMP_WORDS[i]}; break ;;
    esac
  done
  COMPREPLY=()
  case $prev in
    --config | --on-exit | --plugin | --control) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --cgroup | --pin) compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
    --engine) COMPREPLY=($(compgen -W 'auto bpf userspace' -- "$cur")); return ;;
    --log-level) COMPREPLY=($(compgen -W 'debug info warning error' -- "$cur")); return ;;
    --verdict)
      COMPREPLY=($(compgen -W 'rewritten no_backend no_service pass contended ejected' -- "$cur"))
      return
      ;;
    --pid) COMPREPLY=($(compgen -W "$(cd /proc && printf '%s\n' [0-9]*)" -- "$cur")); return ;;
    --service | --backend | --count) return ;;
  esac
  local options='--plugin --help'
  case $verb in
    '') COMPREPLY=($(compgen -W "$verbs --plugin --help --version" -- "$cur")); return ;;
    check | probe) options+=' --json' ;;
    load) options+=' --config --cgroup --pin' ;;
    unload) options+=' --config --pin --on-exit' ;;
    run) options+=' --config --engine --control --log-level' ;;
    status | resolve) options+=' --config --control --pin --json' ;;
    trace) options+=' --service --backend --pid --verdict --count --config --control --pin --json' ;;
  esac
  if [[ $verb == check && $cur != -* ]]; then
    compopt -o filenames
    COMPREPLY=($(compgen -f -- "$cur"))
  else
    COMPREPLY=($(compgen -W "$options" -- "$cur"))
  fi
}
complete -F _clusterip clusterip
