"""Raise an exception, named by the first argument, where a script would import its modules."""

import builtins
import sys

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)
raise getattr(builtins, sys.argv[1])
