"""Check the files of an installed package: manual pages, shell completions and units.

    python scripts/installed_files.py PREFIX

PREFIX has `bin/tinkerfs`. Runs man, bash, zsh and fish, and fails without them.
"""

import os
import subprocess
import sys
from pathlib import Path

#: zsh completes only for a terminal, so it gets one, and a Tab.
ZSH = r"""
zmodload zsh/zpty
zpty shell "PS1= TERM=dumb zsh -f -i"
zpty -w shell "fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D; print is-''ready"
zpty -r -m shell line "*is-ready*"  # not the line that it echoes
zpty -w -n shell $'tinkerfs undel\t'
zpty -r -m shell line "*undelete*"
print -r -- "$line"
"""


def run(*command: str, path: Path, **options: str) -> str:
    """Run a command with an installation first on the PATH; return its output."""
    environment = {**os.environ, **options, "PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode or done.stderr.strip():
        sys.exit(f"{' '.join(command)[:200]}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def check_pages(prefix: Path) -> int:
    """Format every page, and compare the pages with the commands; return their number."""
    programs = prefix / "bin"
    manuals = prefix / "share/man"
    pages = sorted(manuals.glob("man*/*"))
    for page in pages:
        name, section = page.name.removesuffix(".gz").rsplit(".", 1)
        text = run("man", "--warnings=w", "-M", str(manuals), section, name, path=programs)
        if "SYNOPSIS" not in text:
            sys.exit(f"{page}: has no text")
    names = {page.name.partition(".")[0] for page in pages}
    listed = run("tinkerfs", "--help", path=programs).partition("Commands:")[2]
    commands = [line.split()[0] for line in listed.split("\n\n")[0].splitlines() if line.strip()]
    if missing := {f"tinkerfs-{command}" for command in commands} - names:
        sys.exit(f"no manual page: {', '.join(sorted(missing))}")
    return len(pages)


def check_completions(prefix: Path) -> None:
    """Complete a command in each shell."""
    programs, share = prefix / "bin", prefix / "share"
    script = (
        'source "$1"; COMP_WORDS=(tinkerfs undel); COMP_CWORD=1; '
        '_tinkerfs_completion tinkerfs; echo "${COMPREPLY[@]}"'
    )
    bash = str(share / "bash-completion/completions/tinkerfs")
    fish = str(share / "fish/vendor_completions.d/tinkerfs.fish")
    zsh = str(share / "zsh/site-functions")
    found = {
        "bash": run("bash", "--norc", "-c", script, "bash", bash, path=programs),
        "fish": run(
            "fish", "-N", "-c", f"source {fish}; complete -C 'tinkerfs undel'", path=programs
        ),
        "zsh": run("zsh", "-f", "-c", ZSH, "zsh", zsh, path=programs),
    }
    for shell, text in found.items():
        if "undelete" not in text:
            sys.exit(f"{shell} does not complete: {text!r}")


def main() -> None:
    """Check all files of an installation."""
    prefix = Path(sys.argv[1]).resolve()
    pages = check_pages(prefix)
    check_completions(prefix)
    for manager in ("system", "user"):
        unit = prefix / "lib/systemd" / manager / "tinkerfs@.service"
        if "ExecStart=" not in unit.read_text():
            sys.exit(f"{unit} is not a unit")
    print(f"{prefix}: {pages} manual pages, 2 units, completions of bash, fish and zsh")


if __name__ == "__main__":
    main()
