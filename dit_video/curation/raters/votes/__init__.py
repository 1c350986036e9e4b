"""Votes of raters who compared samples side by side: files, control questions, win rates, scores and agreement."""

from dit_video.curation.raters.votes.agreement import compute_krippendorff_alpha
from dit_video.curation.raters.votes.bradley_terry import fit_bradley_terry
from dit_video.curation.raters.votes.page_key import QUESTIONS, PageControl, PageKey, PagePair
from dit_video.curation.raters.votes.results import VoteResults, summarize_votes
from dit_video.curation.raters.votes.votes_file import RaterVotes, Vote, read_votes
from dit_video.curation.raters.votes.win_rates import WinRate, compute_win_rate
