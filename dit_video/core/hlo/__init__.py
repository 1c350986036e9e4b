"""Reader of XLA's compiled programs: operations, memory traffic, kernels and collectives, from their HLO text."""

from dit_video.core.hlo.program import ATTENTION_KERNELS, AttentionCall, CollectiveTraffic, Program, read_program
