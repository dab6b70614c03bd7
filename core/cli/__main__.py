"""``python -m layerfs.cli``: the command line without an installed script."""

import sys

from layerfs.cli import main

sys.exit(main())
