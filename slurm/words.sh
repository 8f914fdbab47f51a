# Sourced by settings.sh and node.sh: how the value of a setting becomes words.

# Sets words from the setting named $1: white space separates, line ends too. One that is @FILE, and FILE is there, is
# one word, whatever its folders are called.
split() {
  words=()
  if [[ ${!1} == @* ]] && [ -f "${!1#@}" ]; then
    words=("${!1}")
  else
    read -r -d '' -a words <<<"${!1}" || true
  fi
}

# The words given, as a shell takes them, without quotes where none are needed.
shown() {
  local word
  for word in "$@"; do [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] && printf '%s ' "$word" || printf '%q ' "$word"; done
}
