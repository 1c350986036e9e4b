"""Search for mistakes that let a training run, and go wrong: checks of its data, model, objective and steps.

Each check compares what the training does with something that is computed in another way: cached latents with the clip
encoded again, rows with the examples they were made of, outputs of the model with those for changed inputs, gradients
with finite differences, and updates with the equations of the optimizer. They begin with the first step after a start,
use the training's own batches and state, and change neither.
"""
