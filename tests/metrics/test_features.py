import hashlib
import warnings

import lpips
import numpy as np
import pytest
import torch
import torchvision

from defectlib import paths
from defectlib.data import textures
from defectlib.metrics import features, files, tiny


def pictures(n, seed=0, size=64):
    return list(textures.batch(n, np.random.default_rng(seed), size)[0])


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """Neither `weights/` nor torch's cache holds anything."""
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    features.load.cache_clear()
    features.load_perceptual.cache_clear()
    yield tmp_path
    features.load.cache_clear()
    features.load_perceptual.cache_clear()


def place(folder, name, state, monkeypatch):
    """Save a state dict under a name that carries its own digest, and make it the file of ``name``."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()
    path = (folder / "x.pth").rename(folder / f"net-{digest[:8]}.pth")
    monkeypatch.setitem(files.FILES, name, (path.name, "https://example.org/"))
    return path, digest


def random_lpips(name, **options):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return lpips.LPIPS(net=name, pnet_rand=True, verbose=False, **options).eval()


def test_metric_name():
    assert features.metric_name("tiny", "kid") == "tiny-kid"


@pytest.mark.parametrize("name, load", [("inception", "load"), ("alex", "load_perceptual"), ("vgg", "load_perceptual")])
def test_missing_weights_stop_with_the_command(no_weights, name, load):
    with pytest.raises(FileNotFoundError, match=f"python -m defectlib.metrics.files {name}"):
        getattr(features, load)(name)
    present, where, how = features.available()[name]
    assert not present and where == "" and "defectlib.metrics.files" in how


def test_a_damaged_file_is_refused(no_weights):
    folder = paths.WEIGHTS
    folder.mkdir()
    (folder / files.FILES["alex"][0]).write_bytes(b"not the weights")
    with pytest.raises(ValueError, match="is damaged: its sha256 begins with"):
        features.load_perceptual("alex")
    present, _, how = features.available()["alex"]
    assert not present and "damaged" in how


def test_torch_cache_is_looked_in(no_weights, monkeypatch):
    path, digest = place(no_weights / "hub" / "checkpoints", "alex", {}, monkeypatch)
    assert files.locate("alex") == (path, digest)
    assert features.available()["alex"][:2] == (True, str(path))


def test_unknown_names():
    with pytest.raises(ValueError, match="no extractor 'resnet'; there are: tiny, inception"):
        features.load("resnet")
    with pytest.raises(ValueError, match="no perceptual trunk 'inception'; there are: tiny, alex, vgg"):
        features.load_perceptual("inception")


def test_tiny_is_always_there():
    assert features.available()["tiny"][:2] == (True, str(tiny.WEIGHTS))


def test_tiny_features_are_the_networks_own():
    given = pictures(5)
    found, logits = features.load("tiny").both(given)
    expected = tiny.load().features_and_logits(tiny.prepare(given))
    assert torch.allclose(found, expected[0], atol=1e-5) and torch.allclose(logits, expected[1], atol=1e-4)
    assert torch.equal(found, features.load("tiny")(given))


def test_features_do_not_depend_on_the_batch():
    given = pictures(7, size=48)
    extract, trunk = features.load("tiny"), features.load_perceptual("tiny")
    assert torch.allclose(extract(given, batch_size=7), extract(given, batch_size=2), atol=1e-5)
    assert torch.allclose(trunk.embed(given, batch_size=7), trunk.embed(given, batch_size=3), atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 2.0), torch.zeros(1, 8, 8)]
)
def test_wrong_images_are_refused(wrong):
    with pytest.raises(ValueError, match="image 1 must"):
        features.load("tiny")([torch.zeros(3, 8, 8), wrong])
    with pytest.raises(ValueError, match="image 0 must"):
        features.load_perceptual("tiny").embed([wrong])


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        features.load("tiny")([])


@pytest.mark.parametrize("name, heads", [("alex", True), ("vgg", True), ("alex", False)])
def test_squared_distance_of_embeddings_is_lpips(name, heads):
    """lpips' own forward pass over pairs, seeded random trunk, its own heads (or none)."""
    model = random_lpips(name, lpips=heads)
    given = pictures(3)
    found = features.lpips_trunk(model, name, "").embed(given)
    for i, j in ((0, 1), (1, 2), (0, 0)):
        with torch.no_grad():
            expected = model(given[i][None], given[j][None]).item()
        assert (found[i] - found[j]).square().sum().item() == pytest.approx(expected, abs=1e-6)


def test_tiny_distance_is_lpips_arithmetic_with_uniform_weights():
    given = pictures(2)
    found = features.load_perceptual("tiny").embed(given)
    one, two = (tiny.load().maps(picture[None]) for picture in given)
    layers = [
        lpips.spatial_average(((lpips.normalize_tensor(a) - lpips.normalize_tensor(b)) ** 2).sum(1, keepdim=True))
        for a, b in zip(one, two)
    ]
    expected = sum(layers).item()
    assert expected > 0.05
    assert (found[0] - found[1]).square().sum().item() == pytest.approx(expected, abs=1e-5)


def test_negative_heads_are_refused():
    with pytest.raises(ValueError, match="negative weight"):
        features.Perceptual("x", lambda x: [x], [torch.tensor([1.0, -1.0, 1.0])], "")


def test_large_sets_of_embeddings_lie_in_a_file(monkeypatch):
    given, trunk = pictures(3), features.load_perceptual("tiny")
    in_memory = trunk.embed(given)
    monkeypatch.setattr(features, "MEMORY_LIMIT", 1000)
    assert torch.equal(trunk.embed(given), in_memory)


def test_alexnet_weights_reach_lpips(no_weights, monkeypatch):
    """A torchvision AlexNet saved as its weight file would be, against lpips given the same trunk."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = torchvision.models.alexnet(weights=None)
    state = {key: value for key, value in net.state_dict().items() if key.startswith("features")}
    place(paths.WEIGHTS, "alex", state, monkeypatch)
    model = random_lpips("alex")
    for key, value in model.net.state_dict().items():
        value.copy_(state["features." + key.split(".", 1)[1]])
    given = pictures(2)
    found = features.load_perceptual("alex").embed(given)
    with torch.no_grad():
        expected = model(given[0][None], given[1][None]).item()
    assert (found[0] - found[1]).square().sum().item() == pytest.approx(expected, abs=1e-6)


def test_inception_is_torch_fidelitys(no_weights, monkeypatch):
    """Random Inception weights saved as the file would be: the layers are "2048" and "logits_unbiased"."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = Blank("blank", ["2048", "logits_unbiased"])
    place(paths.WEIGHTS, "inception", blank.state_dict(), monkeypatch)
    given = pictures(2)
    found, logits = features.load("inception").both(given)
    pixels = torch.stack([((p + 1) * 127.5).round().to(torch.uint8) for p in given])
    expected = blank(pixels)
    assert found.shape == (2, 2048) and torch.allclose(found, expected[0], atol=1e-5)
    assert logits.shape == (2, 1008) and torch.allclose(logits, expected[1], atol=1e-4)
    with pytest.raises(ValueError, match="images of one size"):
        features.load("inception")([torch.zeros(3, 64, 64), torch.zeros(3, 32, 32)])
