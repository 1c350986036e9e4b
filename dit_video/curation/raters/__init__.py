"""Page on which people compare the samples of systems, pair by pair, without knowing whose they are."""

from dit_video.curation.raters.page import PageOptions, get_key_path, write_page
from dit_video.curation.raters.sample_sets import PromptSamples, name_systems, read_sample_sets
