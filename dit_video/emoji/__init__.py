"""Animated emoji: a real, captioned set of short loops whose names have parts that a model can compose.

Microsoft's animated Fluent emoji, in the npm packages `@lobehub/fluent-emoji-anim-1` to `-4`, which declare the MIT
licence. `names` tells what each file shows, `source` fetches and prepares them.
"""
