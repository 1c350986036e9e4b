"""Ask for huge pages, which starts this program again; print the setting and the arguments."""

import os
import sys

from dit_video.core.platform.scripts import use_huge_pages

print("before", flush=True)
use_huge_pages(__name__)
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
