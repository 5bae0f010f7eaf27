"""The lab by hand: `python -m tests.lab {up,down,list,enter NAME,build}`."""

from __future__ import annotations

import argparse
import os
import sys

from tests.lab import host, images
from tests.lab.flavours import FLAVOURS
from tests.lab.lab import Lab


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="make the lab's network and servers, and leave them")
    verbs.add_parser(
        "down", help="stop and remove everything the lab made, for the demo and for tests"
    )
    verbs.add_parser("list", help="the lab's machines")
    enter = verbs.add_parser("enter", help="a root shell in a machine")
    enter.add_argument("name")
    verbs.add_parser("build", help="install what is missing and build every image")
    args = parser.parse_args()
    lab = Lab()
    try:
        if args.verb == "up":
            lab.up()
            lab.detach()
        elif args.verb == "down":
            lab.down()
            Lab(images.lab_dir() / "tests").down()
        elif args.verb == "list":
            for machine in lab.machines().values():
                state = "running" if machine.running else "off"
                print(f"{machine.name:12} {machine.address:15} {machine.flavour:10} {state}")
        elif args.verb == "enter":
            machines = lab.machines()
            if args.name not in machines:
                known = ", ".join(machines) or "none"
                raise host.LabError(f"no machine is called {args.name!r}; there are: {known}")
            words = machines[args.name].enter()
            os.execvp(words[0], words)
        else:
            host.prepare()
            for flavour in FLAVOURS.values():
                print(f"{flavour.name}: {images.rootfs(flavour)}")
            print(f"{images.CONSUL_IMAGE}: {images.consul_archive()}")
            print(f"{images.BOX_IMAGE}: {images.box_archive()}")
    except host.LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
