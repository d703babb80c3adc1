# For the man pages as lowdown writes them. A plain "-" is a hyphen to roff; an option needs a minus.
s/--/\\-\\-/g
# .SH and its title on one line, and no paragraph begun where a section has just begun.
/^\.SH$/{
  N
  s/\n/ /
  n
  /^\.LP$/d
}
