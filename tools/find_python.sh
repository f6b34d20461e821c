#!/bin/sh
# Prints the interpreter to use: `newest` tested (3.12, else 3.13, else 3.11), or `floor` (3.11). Nothing when there is none.
# Looks on PATH first, then among pyenv's versions, whose shims may be there and refuse to run.
case "$1" in
newest) versions="3.12 3.13 3.11" ;;
floor) versions="3.11" ;;
*) echo "usage: $0 newest|floor" >&2; exit 2 ;;
esac
usable() { "$1" -c "import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1; }
for version in $versions; do
  for candidate in "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python; do
    if usable "$candidate" "$version"; then
      command -v "$candidate"
      exit 0
    fi
  done
done
