"""Votes of raters who compared samples side by side: files, control questions, win rates, scores and agreement."""

from dit_video.evaluation.votes.agreement import compute_krippendorff_alpha
from dit_video.evaluation.votes.bradley_terry import fit_bradley_terry
from dit_video.evaluation.votes.page_key import QUESTIONS, PageControl, PageKey, PagePair
from dit_video.evaluation.votes.results import VoteResults, summarize_votes
from dit_video.evaluation.votes.votes_file import RaterVotes, Vote, read_votes
from dit_video.evaluation.votes.win_rates import WinRate, compute_win_rate
