"""Diffusion as pure functions: a process, an objective, samplers and guidance for any `denoise`.

A process is `x_t = alpha(t) x_0 + sigma(t) epsilon`, at times from 0 (data) to 1 (noise); all else follows from these
two functions. docs/diffusion.md derives it: the score, the probability flow, the changes of variables in which samplers
solve it, and the posterior.
"""

from dit_video.diffusion.data_limits import ClippedPrediction, ThresholdedPrediction
from dit_video.diffusion.distillation import (
    compute_distance,
    consistency_loss,
    make_consistency_fn,
    matching_gradient,
    matching_loss,
    run_multistep,
    step_along_flow,
)
from dit_video.diffusion.guidance import (
    TEXT,
    Branches,
    Guidance,
    GuidanceState,
    SkipLayerGuidance,
    alone,
    apply_classifier_free_guidance,
    apply_guidance,
    batched,
    sequential,
)
from dit_video.diffusion.guidance_methods import (
    GUIDANCE_METHODS,
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    GuidanceInputs,
    GuidanceMethod,
    ZeroStarGuidance,
    get_guidance_method,
)
from dit_video.diffusion.learned_variance import LearnedVariance
from dit_video.diffusion.likelihood import (
    Divergence,
    ExactTrace,
    HutchinsonTrace,
    Likelihood,
    ProbeTrace,
    log_likelihood,
)
from dit_video.diffusion.objective import (
    X0,
    DenoiseFn,
    EdmWeight,
    Epsilon,
    Estimator,
    FlowMatching,
    MinSnr,
    Objective,
    Preconditioning,
    Prediction,
    SigmoidWeight,
    UniformWeighting,
    V,
    Velocity,
    Weighting,
    make_estimator,
    stateless,
)
from dit_video.diffusion.processes import (
    BetaSchedule,
    CosineBetas,
    Edm,
    Estimate,
    LinearBetas,
    Normal,
    Process,
    RectifiedFlow,
    ScaledLinearBetas,
    VariancePreservingProcess,
)
from dit_video.diffusion.samplers import (
    SOLVERS,
    Ddim,
    Ddpm,
    DpmMultistep,
    DpmSinglestep,
    Euler,
    Heun,
    Inversion,
    Lcm,
    Pndm,
    SamplingState,
    Solver,
    StepInterval,
    UniPc,
    advance,
    get_solver,
    init_sampling,
    invert,
    make_noise_fn,
    sample,
    trace,
)
from dit_video.diffusion.shift import ClipSize, ExponentialShift, LinearShift, SizeShift
from dit_video.diffusion.time_distributions import (
    LogitNormal,
    LogNormalSigma,
    Mode,
    SampleTimes,
    TimeDistribution,
    Uniform,
    draw_low_discrepancy,
)
from dit_video.diffusion.time_schedules import (
    BetaTimes,
    DiscreteSchedule,
    DpmFlowSchedule,
    ExplicitTimes,
    ExponentialTimes,
    FlowMatchSchedule,
    KarrasTimes,
    LcmSchedule,
    LinearQuadraticTimes,
    ShiftedTimes,
    TimeSchedule,
    UniformTimes,
    UniPcFlowSchedule,
    make_uniform_times,
    override_shift,
)
