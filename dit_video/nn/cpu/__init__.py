"""Operations in a form that XLA's CPU backend computes faster."""
