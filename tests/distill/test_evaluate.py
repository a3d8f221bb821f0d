"""Measures against formulas; an evaluation from pipeline to figures, sheet and card."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import linfusion as lf
from linfusion.distill import card
from linfusion.distill.config import EvalConfig
from linfusion.distill.evaluate import evaluate
from linfusion.distill.metrics import AutoencoderFeatures, distances, feature_network, psnr, ssim
from linfusion.pipelines.generate import psnr as picture_psnr

from .tiny import PROMPTS, SIZES, build


def test_psnr():
    a, b = torch.rand(2, 3, 3, 16, 16)
    a, b = (x.mul(255).round() / 255 for x in (a, b))
    images = [Image.fromarray((x[1] * 255).byte().permute(1, 2, 0).numpy()) for x in (a, b)]
    assert math.isclose(psnr(a, b)[1], picture_psnr(*images), rel_tol=1e-6)
    assert psnr(a, a) == [math.inf] * 3


def test_ssim():
    """Against torchmetrics' own, less the padded edges that it averages over too."""
    measures = pytest.importorskip("torchmetrics.functional.image")
    a = torch.rand(2, 3, 40, 40, dtype=torch.float64)
    for noise in (0.02, 0.3):
        b = (a + noise * torch.randn_like(a)).clamp(0, 1)
        _, values = measures.structural_similarity_index_measure(b, a, data_range=1.0, return_full_image=True)
        assert math.isclose(ssim(a, b), values[..., 5:-5, 5:-5].mean(), abs_tol=1e-5)
    assert math.isclose(ssim(a, a), 1.0)


class Colours(nn.Module):
    num_features = 3

    def forward(self, x):
        return x.mean((2, 3))


def test_fid_and_kid():
    """FID by its formula, on a feature network of three numbers; any network will do."""
    pytest.importorskip("torchmetrics")
    real, drawn = torch.rand(40, 3, 8, 8), torch.rand(40, 3, 8, 8) * 0.5
    a, b = (x.mean((2, 3)).double() for x in (real, drawn))
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * product
    found = distances(real, drawn, Colours())
    assert math.isclose(found["fid"], wanted, rel_tol=1e-3) and found["kid"] > 0.1
    same = distances(real, real, Colours())
    assert abs(same["fid"]) < 1e-6 and abs(same["kid"]) < 0.02
    assert distances(real, drawn, Colours()) == found  # KID draws subsets, the same each time
    with pytest.raises(ValueError, match="at least two"):
        distances(real[:1], drawn, Colours())
    with pytest.raises(ValueError, match="features must be"):
        feature_network("other", None)


def test_the_autoencoder_as_feature_network(name):
    pipe = build(name)
    features = AutoencoderFeatures(pipe.vae)
    x = torch.rand(2, 3, SIZES[name], SIZES[name])
    assert features(x).shape == (2, features.num_features)
    assert not torch.allclose(*features(x))


def test_evaluation(tmp_path, name):
    pipe = build(name)
    config = EvalConfig(
        num_samples=3, eval_batch_size=2, resolution=SIZES[name], scales=[1, 2], num_inference_steps=2, features="vae"
    )
    (tmp_path / card.FACTS).write_text(json.dumps({"mechanism": "LiT()", "base_model": "tiny", "layers": 4}))
    students = {"same": lambda p: lf.apply(p, lf.Softmax()), "student": lambda p: lf.apply(p, lf.LiT())}
    measures = {"reds": lambda pictures, prompts: float(pictures[:, 0].mean()) + len(prompts)}
    figures = evaluate(pipe, PROMPTS, config, students, folder=tmp_path, measures=measures)
    assert json.loads((tmp_path / card.FIGURES).read_text()) == figures
    assert list(figures["sizes"]) == [str(SIZES[name]), str(2 * SIZES[name])]
    for found in figures["sizes"].values():
        assert found["same psnr"] == 100 and math.isclose(found["same ssim"], 1) and abs(found["same fid"]) < 1e-6
        assert found["student psnr"] < 60 and found["student ssim"] < 1 and found["student fid"] > 0
        assert found["student attention work left"] != 1 == found["same attention work left"]
        assert found["teacher reds"] == found["same reds"] > 3 and found["teacher seconds a step"] > 0
    assert lf.describe(pipe).replaced == 0
    text = (tmp_path / "README.md").read_text()
    assert f"At {SIZES[name]} pixels, 3 prompts" in text and "| student psnr |" in text and "(sheet.png)" in text
    assert np.asarray(Image.open(tmp_path / "sheet.png")).std() > 1
    for changes, message in (({"num_samples": 0}, "no prompts"), ({"scales": [0.0]}, "scales must be positive")):
        with pytest.raises(ValueError, match=message):
            evaluate(pipe, PROMPTS, EvalConfig(**changes), students, folder=tmp_path)


def test_what_was_measured_stays(tmp_path):
    """When a later student fails, or someone stops a long evaluation."""
    pipe = build("sd")
    config = EvalConfig(num_samples=1, resolution=SIZES["sd"], num_inference_steps=1, features="none")
    students = {"same": lambda p: lf.apply(p, lf.Softmax()), "broken": lambda p: lf.apply(p, None)}
    with pytest.raises(Exception, match="None"):
        evaluate(pipe, PROMPTS, config, students, folder=tmp_path)
    found = json.loads((tmp_path / card.FIGURES).read_text())["sizes"][str(SIZES["sd"])]
    assert found["same psnr"] == 100 and "same lpips" not in found
