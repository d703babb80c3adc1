# fish completion for fallback_proxy(8)
complete -c fallback_proxy -f
complete -c fallback_proxy -l config -r -F -d 'The configuration'
complete -c fallback_proxy -l control -r -F -d 'The control socket'
complete -c fallback_proxy -l take-over -d 'Replace the proxy that serves'
complete -c fallback_proxy -l status -d 'Show what is served'
complete -c fallback_proxy -l json -d 'Show the status as JSON'
complete -c fallback_proxy -l cleanup -d 'Remove local routes of a killed proxy'
complete -c fallback_proxy -l help -d 'Show the options'
complete -c fallback_proxy -l version -d 'Show the version'
