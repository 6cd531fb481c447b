"""diffusers' video models on our operators: two lines, and the same pictures.

    from swifti2v_kernels.integrations.diffusers import accelerate
    accelerate(pipe)

The ``forward`` of attention modules and of layers is replaced, beneath whatever hooks these have; attention processors
stay where they are. Weights are neither copied nor converted: projections are called as modules, so LoRA, offloading
and quantised linear layers keep working. Known are Wan (2.1, 2.2, VACE, Animate), HunyuanVideo, LTX-Video, CogVideoX,
and the Wan VAE. :class:`DiffusersWanWindow` makes a Wan transformer a model that is sampled segment by segment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..patching import Report, models_in, patch_models, restore
from ..recipe import HostChanged
from .csg import DiffusersWanWindow

__all__ = ["DiffusersWanWindow", "HostChanged", "Report", "accelerate", "restore"]


def accelerate(
    pipe_or_module: Any,
    attention: bool = True,
    norms: bool = True,
    vae: bool = True,
    dry_run: bool = False,
) -> Report:
    """Puts our operators into a diffusers pipeline or model wherever they are known to fit, and prints what it did.

    The pipeline is used as before and gives the same result up to rounding. Offloading, LoRA and ``torch.compile`` may
    come before or after; a model that is compiled already is compiled anew at its next call. Inputs that need gradients
    take the differentiable PyTorch path of the operators.

    Args:
        pipe_or_module: a ``DiffusionPipeline``, or one of its models. A model that was accelerated before is restored
            first, so the last call decides.
        attention: whether to replace attention: norm and rotation of queries and keys are fused, text and
            video read as two sources instead of being concatenated.
        norms: whether to replace the adaptive norms, gates and residuals of the layers.
        vae: whether to replace the convolutions, norms and upsampling of the Wan VAE.
        dry_run: whether only to report what would be replaced.

    Returns:
        A report of what was replaced, and of what was not and why. Printed again after a run, it counts the calls:
        served, handed back to diffusers and why. Its ``restore()`` undoes it.

    Raises:
        TypeError: there is no torch module in it.
        HostChanged: this version of diffusers differs from what a replacement was written for, in an attribute that the
            message names. Nothing is changed then.

    Examples:
        >>> pipe = WanImageToVideoPipeline.from_pretrained(...)  # doctest: +SKIP
        >>> report = accelerate(pipe)  # doctest: +SKIP
        >>> frames = pipe(...).frames  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> report.restore()  # doctest: +SKIP
    """
    import diffusers

    from ..wan_vae.recipes import RECIPES as WAN_VAE
    from . import cross, joint

    recipes = [*(replace(recipe, package="diffusers") for recipe in cross.RECIPES + joint.RECIPES), *WAN_VAE]
    wanted = {"attention": attention, "norms": norms, "vae": vae}
    report = Report(f"swifti2v_kernels in {type(pipe_or_module).__name__} (diffusers {diffusers.__version__})", dry_run)
    patch_models(report, models_in(pipe_or_module, "pipe_or_module"), recipes, wanted)
    return report
