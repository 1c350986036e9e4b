"""Print the digests of encoded clips as JSON."""

import json

from support.encoded_clips import compute_digests

print(json.dumps(compute_digests()))
