import importlib
import json
import warnings

import lpips
import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset

from defectlib import images
from defectlib.data import textures
from defectlib.metrics import features, fidelity, neighbours, perceptual, quality

SHOTS = perceptual.PROTOCOLS["anomalydiffusion"]


def pictures(n, seed=0, size=64):
    return list(textures.batch(n, np.random.default_rng(seed), size)[0])


def one_class(label, n, seed=0):
    return [textures.draw(label, np.random.default_rng([seed, i])) for i in range(n)]


class InMemory(Dataset):
    def __init__(self, given):
        self.pixels = [torch.from_numpy(images.to_uint8(p)).permute(2, 0, 1) for p in given]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def test_kid_by_hand():
    """K = (x.y / 2 + 1)^3: within x 1, within y 8, across 3.375 + 8 + 8 + 1; 1 + 8 - 2 x 20.375 / 4 = -1.1875."""
    x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
    found = quality.kid(torch.from_numpy(x), torch.from_numpy(y), subsets=3, minimum=2)
    assert found == {"value": pytest.approx(-1.1875), "sd": pytest.approx(0, abs=1e-9), "subset_size": 2, "subsets": 3}


def test_kid_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric

    rng = torch.Generator().manual_seed(0)
    real, drawn = torch.rand(12, 20, generator=rng), torch.rand(30, 20, generator=rng) + 0.1
    theirs = kid_features_to_metric(real, drawn, kid_subset_size=9, kid_subsets=7, rng_seed=4, verbose=False)
    ours = quality.kid(real, drawn, subset_cap=9, subsets=7, seed=4)
    assert ours["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-5)
    assert ours["sd"] == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-5)
    assert ours["subset_size"] == 9
    again, other = (quality.kid(real, drawn, 9, 7, seed)["value"] for seed in (4, 5))
    assert again == ours["value"] != other


def test_kid_is_withheld_for_a_few_images():
    found = quality.kid(torch.rand(3, 4), torch.rand(30, 4))
    assert (
        found["value"] is None and found["why_withheld"] == "KID of 3 real and 30 generated images; at least 4 of each"
    )


def test_inception_score_closed_forms():
    assert quality.inception_score(torch.zeros(8, 5))["value"] == pytest.approx(1)
    one_hot = torch.eye(5).repeat(4, 1) * 100
    found = quality.inception_score(one_hot)
    assert found["value"] == pytest.approx(5) and found["splits"] == 1 and found["sd"] is None


def test_inception_score_splits_and_seeds():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(120, 6, generator=torch.Generator().manual_seed(0)) * 2
    found = quality.inception_score(logits, seed=3)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=3)
    assert found["splits"] == 10
    assert found["value"] == pytest.approx(theirs["inception_score_mean"], abs=1e-5)
    assert found["sd"] == pytest.approx(theirs["inception_score_std"], abs=1e-5)
    assert quality.inception_score(logits, seed=4)["value"] != found["value"]


def test_inception_score_is_withheld_where_a_split_would_be_empty():
    assert "4" in quality.inception_score(torch.zeros(3, 5))["why_withheld"]
    assert quality.inception_score(torch.zeros(8, 5), splits=10)["value"] is None


def test_distances_by_hand():
    a, b = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    assert perceptual.lpips_distances(a, b).tolist() == [[1.0, 25.0], [18.0, 0.0]]
    assert [v.tolist() for v in perceptual.lpips_to_nearest(a, b)] == [[1.0, 0.0], [0, 1]]
    assert perceptual.lpips_pairwise(a).tolist() == [[0.0, 25.0], [25.0, 0.0]]


def test_mean_pairwise_is_the_mean_over_pairs(monkeypatch):
    monkeypatch.setattr(perceptual, "BLOCK", 7)
    vectors = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    pairs = perceptual.lpips_pairwise(vectors)[*np.triu_indices(9, 1)]
    assert perceptual.mean_pairwise(vectors) == pytest.approx(pairs.mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="two images"):
        perceptual.mean_pairwise(vectors[:1])


def clusters():
    """Five points on a line around 0, one around 10, none around 20."""
    drawn = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [10.0]])
    return drawn, torch.tensor([[0.0], [10.0], [20.0]])


def test_ic_lpips_protocols_count_lonely_clusters_differently():
    drawn, references = clusters()
    # Squared distances of the ten pairs of 0..4: 4 x 1 + 3 x 4 + 2 x 9 + 16 = 50.
    dropped = perceptual.ic_lpips(drawn, references, SHOTS)
    assert dropped == {"value": pytest.approx(5.0), "clusters": [5, 1, 0], "capped": False}
    for name in ("dfmgan", "seas"):
        assert perceptual.ic_lpips(drawn, references, perceptual.PROTOCOLS[name])["value"] == pytest.approx(5 / 3)


def test_ic_lpips_without_a_pair_is_withheld():
    found = perceptual.ic_lpips(torch.tensor([[0.0], [10.0]]), clusters()[1], perceptual.PROTOCOLS["seas"])
    assert found["value"] is None and "no cluster has two images" in found["why_withheld"]


def test_ic_lpips_cap_is_seeded():
    drawn, references = clusters()
    capped = perceptual.Protocol("capped", "vgg", 256, cap=3, singles="dropped", references="shots")
    values = [perceptual.ic_lpips(drawn, references, capped, seed)["value"] for seed in range(12)]
    assert perceptual.ic_lpips(drawn, references, capped, 7)["value"] == values[7]
    assert len(set(values)) > 1 and min(values) >= 2 and max(values) <= 34 / 3 + 1e-9
    assert perceptual.ic_lpips(drawn, references, capped)["capped"]


def test_protocols_are_those_of_the_released_scripts():
    facts = {name: (p.trunk, p.cap, p.singles, p.references) for name, p in perceptual.PROTOCOLS.items()}
    assert facts == {
        "anomalydiffusion": ("vgg", 50, "dropped", "first third"),
        "dfmgan": ("alex", 200, "zero", "real"),
        "seas": ("vgg", 140, "zero", "shots"),
    }


def test_ic_lpips_against_lpips_pair_by_pair():
    """The script's way: every pair through lpips' own network, seeded random trunk."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    drawn, references = pictures(8, seed=1), pictures(2, seed=2)

    @torch.no_grad()
    def distance(a, b):
        return model(a[None], b[None]).item()

    nearest = [int(np.argmin([distance(a, r) for r in references])) for a in drawn]
    means = []
    for k in range(2):
        members = [a for a, n in zip(drawn, nearest) if n == k]
        pairs = [distance(members[i], members[j]) for i in range(len(members)) for j in range(i)]
        means += [np.mean(pairs)] if pairs else []
    trunk = features.lpips_trunk(model, "alex", "")
    found = perceptual.ic_lpips(trunk.embed(drawn), trunk.embed(references), SHOTS)
    assert found["value"] == pytest.approx(np.mean(means), abs=1e-6)


def test_torch_fidelity_runs_our_extractor_and_agrees():
    drawn, real = pictures(12, seed=3, size=80), pictures(9, seed=4, size=80)
    theirs = torch_fidelity.calculate_metrics(
        input1=InMemory(drawn), input2=InMemory(real), kid=True, isc=True, cuda=False, cache=False, verbose=False,
        feature_extractor=fidelity.NAME, kid_subset_size=8, kid_subsets=5, isc_splits=1, rng_seed=2, save_cpu_ram=True,
        batch_size=5,
    )  # fmt: skip
    f_drawn, logits = features.load("tiny").both(drawn)
    f_real = features.load("tiny")(real)
    assert quality.inception_score(logits)["value"] == pytest.approx(theirs["inception_score_mean"], abs=1e-5)
    # torch-fidelity draws the subset of its first input first.
    ours = quality.kid(f_drawn, f_real, 8, 5, 2)
    assert ours["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-5)


def test_registration_is_guarded():
    importlib.reload(fidelity)
    assert fidelity.NAME == "defectlib-tiny"


def test_evaluate_rows_and_protocols():
    drawn, real = one_class(15, 12, 1), one_class(15, 9, 2)
    rows = quality.evaluate(drawn, real, real[:3], seeds=[0, 1], subset_cap=6, subsets=4, perceptual="tiny")
    assert [row["metric"] for row in rows] == quality.names("tiny", "tiny") == [
        "tiny-kid", "tiny-is", "tiny-precision", "tiny-recall", "tiny-density", "tiny-coverage",
        "tiny-lpips", "tiny-ic-lpips",
    ]  # fmt: skip
    assert all(isinstance(row["value"], float) for row in rows)
    for row in rows:
        about = row["protocol"]
        assert about["extractor"] == "tiny" and about["n_real"] == 9 and about["n_generated"] == 12
        assert about["seeds"] == [0, 1] and "bicubic" in about["resize"] and about["image_size"] == 64
        low, high = about["ci95"]
        assert low < high and low <= row["value"] <= high
        json.dumps(about)
    by_name = {row["metric"]: row for row in rows}
    assert by_name["tiny-kid"]["protocol"]["subset_size"] == 6 and by_name["tiny-kid"]["sd"] > 0
    assert by_name["tiny-is"]["sd"] is None and by_name["tiny-is"]["protocol"]["splits"] == 1
    clustered = by_name["tiny-ic-lpips"]["protocol"]
    assert clustered["protocol"] == "anomalydiffusion" and clustered["protocol_trunk"] == "vgg"
    assert sum(clustered["clusters"]) == 12 and clustered["n_references"] == 3
    assert by_name["tiny-kid"]["protocol"]["ci95_over"] == "samples and real images"
    assert by_name["tiny-coverage"]["protocol"]["ci95_over"] == "samples and real images"
    assert by_name["tiny-coverage"]["protocol"]["of_real_itself"] == neighbours.expected_coverage(9, 12)


def test_evaluate_does_not_depend_on_order_or_batch():
    drawn, real = pictures(12, seed=5), pictures(8, seed=6)
    arguments = {"perceptual": "tiny", "seeds": [0, 1], "subset_cap": 5, "subsets": 3}
    first = quality.evaluate(drawn, real, real[:2], **arguments)
    second = quality.evaluate(drawn[::-1], real[::-1], real[:2][::-1], batch_size=5, **arguments)
    for one, two in zip(first, second):
        assert one["value"] == pytest.approx(two["value"], abs=1e-5)
        assert one["protocol"]["ci95"] == pytest.approx(two["protocol"]["ci95"], abs=1e-5)
        assert one["metric"] == two["metric"]


def test_evaluate_tells_texture_classes_apart():
    """Samples of the same class are nearer than those of another, for KID and for LPIPS."""
    real = one_class(16, 12, 1)
    same, other = (
        {
            row["metric"]: row["value"]
            for row in quality.evaluate(one_class(k, 12, 2), real, real[:2], perceptual="tiny", seeds=[0])
        }
        for k in (16, 24)
    )
    assert same["tiny-kid"] < other["tiny-kid"] and same["tiny-lpips"] < other["tiny-lpips"]
    copies = {
        row["metric"]: row["value"] for row in quality.evaluate(real, real, real[:2], perceptual="tiny", seeds=[0])
    }
    assert copies["tiny-lpips"] == 0.0 and copies["tiny-kid"] <= 0


def test_evaluate_withholds_with_a_reason():
    few = pictures(2)
    rows = {row["metric"]: row for row in quality.evaluate(few, few, few, perceptual="tiny")}
    for name in ("tiny-kid", "tiny-is", "tiny-lpips", "tiny-ic-lpips"):
        assert rows[name]["value"] is None and rows[name]["sd"] is None and rows[name]["protocol"]["why_withheld"]
    three = quality.evaluate(pictures(3), pictures(7, 1), few, perceptual="tiny", seeds=[0])
    told = {row["metric"]: row["protocol"].get("why_withheld") for row in three}
    assert told["tiny-ic-lpips"] == "IC-LPIPS of 3 generated images; at least 4", "though a cluster has two"
    seven = quality.evaluate(pictures(7), pictures(7, 1), few, perceptual="tiny", seeds=[0])
    assert not any("ci95" in row["protocol"] for row in seven), "an interval of so few is too narrow"
    assert "2 real and 2 generated images; at least 8" in rows["tiny-recall"]["protocol"]["why_withheld"]


def test_dfmgan_clusters_around_all_real():
    drawn, real = pictures(6, seed=7), pictures(5, seed=8)
    rows = quality.evaluate(drawn, real, real[:1], perceptual="tiny", protocol="dfmgan", seeds=[0])
    assert rows[-1]["protocol"]["n_references"] == 5


def test_evaluate_refuses_what_it_cannot_measure():
    given = pictures(4)
    with pytest.raises(ValueError, match="no IC-LPIPS protocol 'x'; there are: anomalydiffusion, dfmgan, seas"):
        quality.evaluate(given, given, given, protocol="x")
    with pytest.raises(ValueError, match="no images"):
        quality.evaluate(given, [], given)
    with pytest.raises(ValueError, match="uint8"):
        quality.evaluate([torch.zeros(3, 8, 8, dtype=torch.uint8)], given, given)
    with pytest.raises(ValueError, match="seed"):
        quality.evaluate(given, given, given, seeds=[])


def test_spread_of_halves_and_quarters():
    rng = torch.Generator().manual_seed(0)
    real, drawn = torch.rand(16, 5, generator=rng), torch.rand(10, 5, generator=rng)
    frame = quality.subset_spread(real, drawn, repeats=6, seed=0)
    assert frame.groupby("pair")["n"].unique().map(list).to_dict() == {
        "real vs generated": [2, 5],
        "real vs real": [2, 4, 8],
    }
    assert len(frame) == 30 and frame["kid"].notna().all()
    assert frame.equals(quality.subset_spread(real, drawn, repeats=6, seed=0))
    wide = frame[frame["pair"] == "real vs real"].groupby("n")["kid"].std()
    assert wide.iloc[0] > wide.iloc[-1], "more images, steadier"
    with pytest.raises(ValueError, match="four images"):
        quality.subset_spread(real[:3], drawn)


def test_each_image_is_embedded_once(monkeypatch):
    """Shots are real images too: 20 generated and 6 real ones are 26 passes, not 29."""
    passed, real_flat = [], features.Perceptual._flat

    def counted(self, maps):
        passed.append(len(maps[0]))
        return real_flat(self, maps)

    monkeypatch.setattr(features.Perceptual, "_flat", counted)
    drawn, real = pictures(20), pictures(6, 1)
    rows = quality.evaluate(drawn, real, real[:3], perceptual="tiny")
    assert sum(passed) == 26
    strange = quality.evaluate(drawn, real, pictures(3, 2), perceptual="tiny")
    assert sum(passed) == 26 + 29, "shots that are not among the real images are embedded too"
    values = [{row["metric"]: row["value"] for row in some} for some in (rows, strange)]
    assert (
        values[0]["tiny-lpips"] == values[1]["tiny-lpips"] and values[0]["tiny-ic-lpips"] != values[1]["tiny-ic-lpips"]
    )
