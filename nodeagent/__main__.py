"""`python -m nodeagent` is the same program as `nodeagent`."""

import sys

from nodeagent.cli import main

sys.exit(main())
