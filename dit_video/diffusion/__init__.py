r"""Diffusion as pure functions: a process, an objective, samplers and guidance, on any `denoise(noisy, time)`.

**A process** says how much of the data and of the noise there is at a time from 0 (data) to 1 (noise):

$$x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon, \qquad \epsilon \sim N(0, 1)$$

and everything follows from the two functions. Their ratio is the signal-to-noise ratio, of logarithm
$2\lambda = 2 \log(\alpha / \sigma)$. Given the data, $x_t$ is normal of variance $\sigma^2$ around $\alpha x_0$, and
the gradient of its log density is $-\epsilon / \sigma$; the mean of that over all data that $x_t$ may stem from is the
score of the density of all $x_t$, so that a model that predicts the noise by least squares knows it (arXiv 1907.05600):

$$\nabla_x \log p_t(x) = -\hat\epsilon(x, t) / \sigma, \qquad \hat\epsilon = E[\epsilon \mid x_t = x]$$

**A prediction** is any other sum of the two parts, and is taken apart again (`predictions`).

**An objective** is a prediction, learned by least squares at times drawn from a distribution (`times`); how much an
error counts at each time is defined once for all predictions (`weighting`).

**The process as a differential equation** that passes through the same densities is $dx = f x\,dt + g\,dw$, of
$f = \alpha'/\alpha$ and $g^2 = 2\sigma(\sigma' - f\sigma)$. Backwards it is, for any $\eta \ge 0$ (arXiv 2011.13456,
2206.00364),

$$dx = \Big(f x - \frac{1 + \eta^2}{2} g^2\, \nabla_x \log p_t(x)\Big) dt + \eta\, g\, dw$$

of which $\eta = 0$ is the probability flow. Put $\hat\epsilon$ in for the score and
$x = \alpha \hat x_0 + \sigma \hat\epsilon$ for $x$: the flow is $dx/dt = \alpha' \hat x_0 + \sigma' \hat\epsilon$, the
derivative of the process with its parts held still. Three ways to solve it are used here. In $x / \alpha$ over
$\sigma / \alpha$ the slope is $\hat\epsilon$ alone; over $\lambda$ the linear part is solved exactly (`unipc`); over
the angle between data and noise the slope is $v$, which carries the density along (`likelihood`). A step of the first
two that holds the estimate still is $x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon$: DDIM. With noise, the
second way is `dpm_solver`'s, and a step of DDPM its first order.

**The posterior** $q(x_s \mid x_t, x_0)$ of an earlier time $s$ is normal, as both factors of
$q(x_t \mid x_s)\,q(x_s \mid x_0)$ are (`Process.posterior`); drawn at $x_0 = \hat x_0$ it is a step of DDPM.
"""

from dit_video.diffusion.consistency import consistency_function, consistency_loss, flow_step, multistep
from dit_video.diffusion.diffusers_schedules import DpmFlowGrid, FlowMatchGrid, LcmGrid, StepGrid, UniPcGrid
from dit_video.diffusion.dmd import distance, matching_gradient, matching_loss
from dit_video.diffusion.guidance import (
    Branches,
    Guidance,
    Projected,
    Strength,
    apart,
    batched,
    classifier_free,
    guided,
    mean_of_each,
)
from dit_video.diffusion.learned_variance import LearnedVariance
from dit_video.diffusion.likelihood import Divergence, Exact, Hutchinson, Likelihood, log_likelihood
from dit_video.diffusion.loss_weights import AsPredicted, EdmWeight, MinSnr, SigmoidWeight, Weighting
from dit_video.diffusion.objective import FlowMatching, Objective
from dit_video.diffusion.predictions import (
    X0,
    Denoise,
    Epsilon,
    Estimator,
    Preconditioned,
    Prediction,
    V,
    Velocity,
    estimator,
)
from dit_video.diffusion.processes.edm import Edm
from dit_video.diffusion.processes.process import Estimate, Normal, Process
from dit_video.diffusion.processes.rectified_flow import RectifiedFlow
from dit_video.diffusion.processes.variance_preserving import Betas, Cosine, Linear, ScaledLinear, VariancePreserving
from dit_video.diffusion.sample_times import SampleTimes
from dit_video.diffusion.samplers.ancestral import Ddim, Ddpm, Lcm
from dit_video.diffusion.samplers.dpm_solver import DpmMultistep, DpmSinglestep
from dit_video.diffusion.samplers.inversion import Inversion, invert
from dit_video.diffusion.samplers.momentum import Remembering, RememberingState
from dit_video.diffusion.samplers.sampler import SAMPLERS, Draw, Sampler, advance, draws, sample, sampler, trace
from dit_video.diffusion.samplers.solvers import Euler, Heun, Interval, Solver
from dit_video.diffusion.samplers.traced import Trace, Watched, WatchedState
from dit_video.diffusion.samplers.unipc import UniPc
from dit_video.diffusion.shift import ClipSize, ExponentialShift, LinearShift, SizeShift
from dit_video.diffusion.time_distributions import LogitNormal, LogNormalSigma, Mode, Times, Uniform, low_discrepancy
from dit_video.diffusion.time_schedules import Even, Exponential, Given, Karras, Shifted, TimeGrid, time_grid

__all__ = [
    "SAMPLERS",
    "X0",
    "AsPredicted",
    "Betas",
    "Branches",
    "ClipSize",
    "Cosine",
    "Ddim",
    "Ddpm",
    "Denoise",
    "Divergence",
    "DpmFlowGrid",
    "DpmMultistep",
    "DpmSinglestep",
    "Draw",
    "Edm",
    "EdmWeight",
    "Epsilon",
    "Estimate",
    "Estimator",
    "Euler",
    "Even",
    "Exact",
    "Exponential",
    "ExponentialShift",
    "FlowMatchGrid",
    "FlowMatching",
    "Given",
    "Guidance",
    "Heun",
    "Hutchinson",
    "Interval",
    "Inversion",
    "Karras",
    "Lcm",
    "LcmGrid",
    "LearnedVariance",
    "Likelihood",
    "Linear",
    "LinearShift",
    "LogNormalSigma",
    "LogitNormal",
    "MinSnr",
    "Mode",
    "Normal",
    "Objective",
    "Preconditioned",
    "Prediction",
    "Process",
    "Projected",
    "RectifiedFlow",
    "Remembering",
    "RememberingState",
    "SampleTimes",
    "Sampler",
    "ScaledLinear",
    "Shifted",
    "SigmoidWeight",
    "SizeShift",
    "Solver",
    "StepGrid",
    "Strength",
    "TimeGrid",
    "Times",
    "Trace",
    "UniPc",
    "UniPcGrid",
    "Uniform",
    "V",
    "VariancePreserving",
    "Velocity",
    "Watched",
    "WatchedState",
    "Weighting",
    "advance",
    "apart",
    "batched",
    "classifier_free",
    "consistency_function",
    "consistency_loss",
    "distance",
    "draws",
    "estimator",
    "flow_step",
    "guided",
    "invert",
    "log_likelihood",
    "low_discrepancy",
    "matching_gradient",
    "matching_loss",
    "mean_of_each",
    "multistep",
    "sample",
    "sampler",
    "time_grid",
    "trace",
]
