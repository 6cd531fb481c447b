"""A check on all that a test of this folder loads: ``model.inspect`` says that it loads exactly if it does."""

from __future__ import annotations

import pytest

from model.errors import InputError


@pytest.fixture(autouse=True)
def loaders_and_inspect_agree(request, monkeypatch):
    """``model.inspect`` says yes of a path exactly where a loader, asked for nothing but that path, loads it."""
    if "refused" in request.fixturenames:  # which asks both
        return
    from model.inspect import inspect_checkpoint
    from model.weights import load

    inspecting = False

    def watched(opener, loader, model):
        def open_and_compare(path, config):
            nonlocal inspecting
            if inspecting or config is not None:
                return opener(path, config)
            refusal = opened = None
            try:
                opened = opener(path, config)
                opened[0].check(model, opened[1])
            except InputError as error:
                refusal = error
            inspecting = True
            try:
                parts = load.DIT_PARTS if loader == "load_dit" else load.VAE_PARTS
                report = inspect_checkpoint(load.part_of_pipeline(path, parts))
            finally:
                inspecting = False
            said = report.loaded_by == loader
            both = any("whole pipeline" in part for part in report.layout)
            assert said == (refusal is None) or (both and report.loads), f"{path}: {report.problem}, {refusal}"
            return opener(path, config) if opened is None else opened

        return open_and_compare

    monkeypatch.setattr(load, "_open_dit", watched(load._open_dit, "load_dit", load.WanDiT))
    monkeypatch.setattr(load, "_open_vae", watched(load._open_vae, "load_vae", load.WanVAE))
