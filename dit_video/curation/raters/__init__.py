"""Page on which people compare the samples of systems, pair by pair, without knowing whose they are, and votes."""

from dit_video.curation.raters.page import PageOptions, get_key_path, write_page
from dit_video.curation.raters.prompt_domains import PromptDomains, load_default_prompt_domains, read_prompt_domains
from dit_video.curation.raters.samples import name_systems
from dit_video.curation.raters.votes import PageKey, format_results, read_votes, summarize_votes
