"""Read and copy checkpoints where nothing can be mounted: gVisor, Modal, Lambda, notebooks.

pip install "tinkerfs[fsspec]"
python without_fuse.py DIRECTORY
"""

import subprocess
import sys

import fsspec


def main() -> None:
    files = fsspec.filesystem("tinker")
    # Every checkpoint of the account, as names `<run>@<kind>@<name>`; one listing.
    names = [path.rpartition("/")[2] for path in files.ls("/checkpoints", detail=False)]
    url = "tinker://" + sorted(names)[0].replace("@", "/")
    print(f"{len(names)} checkpoints; the first is {url}")
    for path in files.ls(url, detail=False):
        # A read of a range requests the archive once, and downloads only the range.
        print(path.rpartition("/")[2], len(files.cat_file(path, start=0, end=16)))
    # A copy, which is resumed if it was interrupted.
    subprocess.run(["tinkerfs", "get", url, sys.argv[1]], check=True)


if __name__ == "__main__":
    main()
