r"""Diffusion as pure functions: a process, an objective, samplers and guidance for any `denoise(noisy, time)`.

**A process** defines the proportions of data and noise at a time from 0 (data) to 1 (noise):

$$x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon, \qquad \epsilon \sim N(0, 1)$$

Everything follows from these two functions. Their ratio is the signal-to-noise ratio, whose logarithm is
$2\lambda = 2 \log(\alpha / \sigma)$. Given the data, $x_t$ is normal with mean $\alpha x_0$ and variance $\sigma^2$,
and the gradient of its log density is $-\epsilon / \sigma$. The mean of this gradient over all data that $x_t$ may stem
from is the score, the gradient of the log density of $x_t$ itself. A model that predicts the noise by least squares
therefore knows the score (arXiv 1907.05600):

$$\nabla_x \log p_t(x) = -\hat\epsilon(x, t) / \sigma, \qquad \hat\epsilon = E[\epsilon \mid x_t = x]$$

**A prediction** is any linear combination of data and noise; both are recovered from it (`predictions`).

**An objective** is a prediction learned by least squares at times drawn from a distribution (`time_distributions`). The
weight of an error at each time is defined once for all predictions (`weighting`).

**The process as a differential equation** with the same densities is $dx = f x\,dt + g\,dw$, with $f = \alpha'/\alpha$
and $g^2 = 2\sigma(\sigma' - f\sigma)$. Its reverse is, for any $\eta \ge 0$ (arXiv 2011.13456, 2206.00364),

$$dx = \Big(f x - \frac{1 + \eta^2}{2} g^2\, \nabla_x \log p_t(x)\Big) dt + \eta\, g\, dw$$

With $\eta = 0$ this is the probability flow. Substituting $\hat\epsilon$ for the score and
$x = \alpha \hat x_0 + \sigma \hat\epsilon$ for $x$ gives $dx/dt = \alpha' \hat x_0 + \sigma' \hat\epsilon$, the
derivative of the process with data and noise held constant. Three changes of variables are used to solve it. For
$x / \alpha$ as a function of $\sigma / \alpha$, the slope is $\hat\epsilon$ alone. As a function of $\lambda$, the
linear part is solved exactly (`unipc`). As a function of the angle between data and noise, the slope is $v$, which
transports the density (`likelihood`). A step of the first two that holds the estimate constant is
$x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon$: DDIM. The second one with noise is `dpm_solver`, whose first order is
a step of DDPM.

**The posterior** $q(x_s \mid x_t, x_0)$ of an earlier time $s$ is normal, since both factors of
$q(x_t \mid x_s)\,q(x_s \mid x_0)$ are (`Process.posterior`). A sample of it at $x_0 = \hat x_0$ is a step of DDPM.
"""

from dit_video.diffusion.consistency import consistency_loss, make_consistency_fn, run_multistep, step_along_flow
from dit_video.diffusion.diffusers_schedules import (
    DiscreteSchedule,
    DpmFlowSchedule,
    FlowMatchSchedule,
    LcmSchedule,
    UniPcFlowSchedule,
)
from dit_video.diffusion.dmd import compute_distance, matching_gradient, matching_loss
from dit_video.diffusion.guidance import (
    AdaptiveProjectedGuidance,
    Branches,
    Guidance,
    GuidanceParams,
    apply_classifier_free_guidance,
    apply_guidance,
    average_per_sample,
    batched,
    sequential,
)
from dit_video.diffusion.learned_variance import LearnedVariance
from dit_video.diffusion.likelihood import Divergence, ExactTrace, HutchinsonTrace, Likelihood, log_likelihood
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
from dit_video.diffusion.samplers.momentum import Remembering, RememberingState
from dit_video.diffusion.samplers.sampler import (
    SAMPLERS,
    DiffusionSampler,
    NoiseFn,
    advance,
    get_sampler,
    make_noise_fn,
    sample,
    trace,
)
from dit_video.diffusion.samplers.solvers import Euler, Heun, Solver, StepInterval
from dit_video.diffusion.samplers.traced import Trace, TracedSampler, TracedSamplerState
from dit_video.diffusion.samplers.unipc import UniPc
from dit_video.diffusion.shift import ClipSize, ExponentialShift, LinearShift, SizeShift
from dit_video.diffusion.time_distributions import (
    LogitNormal,
    LogNormalSigma,
    Mode,
    TimeDistribution,
    Uniform,
    draw_low_discrepancy,
)
from dit_video.diffusion.time_schedules import (
    ExplicitTimes,
    ExponentialTimes,
    KarrasTimes,
    ShiftedTimes,
    TimeSchedule,
    UniformTimes,
    make_uniform_times,
)

__all__ = [
    "SAMPLERS",
    "X0",
    "AdaptiveProjectedGuidance",
    "BetaSchedule",
    "Branches",
    "ClipSize",
    "CosineBetas",
    "Ddim",
    "Ddpm",
    "DenoiseFn",
    "DiffusionSampler",
    "DiscreteSchedule",
    "Divergence",
    "DpmFlowSchedule",
    "DpmMultistep",
    "DpmSinglestep",
    "Edm",
    "EdmWeight",
    "Epsilon",
    "Estimate",
    "Estimator",
    "Euler",
    "ExactTrace",
    "ExplicitTimes",
    "ExponentialShift",
    "ExponentialTimes",
    "FlowMatchSchedule",
    "FlowMatching",
    "Guidance",
    "GuidanceParams",
    "Heun",
    "HutchinsonTrace",
    "Inversion",
    "KarrasTimes",
    "Lcm",
    "LcmSchedule",
    "LearnedVariance",
    "Likelihood",
    "LinearBetas",
    "LinearShift",
    "LogNormalSigma",
    "LogitNormal",
    "MinSnr",
    "Mode",
    "NoiseFn",
    "Normal",
    "Objective",
    "Preconditioning",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Remembering",
    "RememberingState",
    "SampleTimes",
    "ScaledLinearBetas",
    "ShiftedTimes",
    "SigmoidWeight",
    "SizeShift",
    "Solver",
    "StepInterval",
    "TimeDistribution",
    "TimeSchedule",
    "Trace",
    "TracedSampler",
    "TracedSamplerState",
    "UniPc",
    "UniPcFlowSchedule",
    "Uniform",
    "UniformTimes",
    "UniformWeighting",
    "V",
    "VariancePreservingProcess",
    "Velocity",
    "Weighting",
    "advance",
    "apply_classifier_free_guidance",
    "apply_guidance",
    "average_per_sample",
    "batched",
    "compute_distance",
    "consistency_loss",
    "draw_low_discrepancy",
    "get_sampler",
    "invert",
    "log_likelihood",
    "make_consistency_fn",
    "make_estimator",
    "make_noise_fn",
    "make_uniform_times",
    "matching_gradient",
    "matching_loss",
    "run_multistep",
    "sample",
    "sequential",
    "step_along_flow",
    "trace",
]
