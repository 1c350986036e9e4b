"""What compiled programs do, read from their text (HLO)."""

from dit_video.core.hlo.program import AttentionCall, CollectiveTraffic, Program, read_program
