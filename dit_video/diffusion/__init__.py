"""Diffusion as pure functions: a process, an objective, samplers and guidance for any `denoise`.

A process is `x_t = alpha(t) x_0 + sigma(t) epsilon`, at times from 0 (data) to 1 (noise); all else follows from these
two functions. docs/diffusion.md derives it: the score, the probability flow, the changes of variables in which samplers
solve it, and the posterior.
"""

from dit_video.diffusion.consistency import consistency_loss, make_consistency_fn, run_multistep, step_along_flow
from dit_video.diffusion.data_limits import ClippedPrediction, ThresholdedPrediction
from dit_video.diffusion.diffusers_schedules import (
    DiscreteSchedule,
    DpmFlowSchedule,
    FlowMatchSchedule,
    LcmSchedule,
    UniPcFlowSchedule,
)
from dit_video.diffusion.dmd import compute_distance, matching_gradient, matching_loss
from dit_video.diffusion.guidance import (
    Branches,
    GuidanceState,
    apply_classifier_free_guidance,
    apply_guidance,
    batched,
    sequential,
)
from dit_video.diffusion.guidance_config import (
    AdaptiveProjectedGuidance,
    Guidance,
    SkipLayerGuidance,
    ZeroStarGuidance,
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
from dit_video.diffusion.loss_weights import EdmWeight, MinSnr, SigmoidWeight, UniformWeighting, Weighting
from dit_video.diffusion.objective import FlowMatching, Objective
from dit_video.diffusion.predictions import (
    X0,
    DenoiseFn,
    Epsilon,
    Estimator,
    Preconditioning,
    Prediction,
    V,
    Velocity,
    make_estimator,
    stateless,
)
from dit_video.diffusion.processes.edm import Edm
from dit_video.diffusion.processes.process import Estimate, Normal, Process
from dit_video.diffusion.processes.rectified_flow import RectifiedFlow
from dit_video.diffusion.processes.variance_preserving import (
    BetaSchedule,
    CosineBetas,
    LinearBetas,
    ScaledLinearBetas,
    VariancePreservingProcess,
)
from dit_video.diffusion.sample_times import SampleTimes
from dit_video.diffusion.samplers.ancestral import Ddim, Ddpm, Lcm
from dit_video.diffusion.samplers.dpm_solver import DpmMultistep, DpmSinglestep
from dit_video.diffusion.samplers.inversion import Inversion, invert
from dit_video.diffusion.samplers.pndm import Pndm
from dit_video.diffusion.samplers.sampler import (
    SAMPLERS,
    SamplingState,
    advance,
    get_sampler,
    init_sampling,
    make_noise_fn,
    sample,
    trace,
)
from dit_video.diffusion.samplers.solvers import Euler, Heun, Solver, StepInterval
from dit_video.diffusion.samplers.unipc import UniPc
from dit_video.diffusion.shift import ClipSize, ExponentialShift, LinearShift, SizeShift
from dit_video.diffusion.time_distributions import (
    LogitNormal,
    LogNormalSigma,
    Mode,
    Uniform,
    draw_low_discrepancy,
)
from dit_video.diffusion.time_schedules import (
    BetaTimes,
    ExplicitTimes,
    ExponentialTimes,
    KarrasTimes,
    LinearQuadraticTimes,
    ShiftedTimes,
    TimeSchedule,
    UniformTimes,
    make_uniform_times,
    override_shift,
)
