import importlib.metadata
import sys

from defectlib import backbone, doctor


def test_a_pin_for_another_python_is_not_compared():
    major, minor = sys.version_info[:2]
    text = (
        "# made by a tool\n"
        f"numpy==2.4.6 ; python_full_version < '{major}.{minor + 1}' \\\n"
        "    --hash=sha256:00\n"
        f"numpy==2.5.5 ; python_full_version >= '{major}.{minor + 1}' \\\n"
        "    --hash=sha256:01\n"
        "scikit-learn==1.9.1 \\\n"
        "    # via torch==1\n"
        "pillow==12.0.0\n"
    )
    assert doctor.locked_versions(text) == {"numpy": "2.4.6", "scikit-learn": "1.9.1", "pillow": "12.0.0"}


def test_a_package_at_another_version_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "requirements.lock").write_text("numpy==0.0.1 \\\n")
    monkeypatch.setattr(doctor.paths, "ROOT", tmp_path)
    _, lines = doctor._packages()
    here = importlib.metadata.version("numpy")
    assert f"{'numpy':28} {here}  (locked: 0.0.1; make env)" in lines
    assert not [line for line in lines if "locked" in line and not line.startswith("numpy")]


def test_a_base_model_that_is_not_here_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFECTLIB_SD15", str(tmp_path / "mistyped"))
    _, lines = doctor._base_models()
    assert lines[0] == f"{'tiny':10} present: {backbone.folder_of('tiny')}"
    assert "mistyped/model_index.json is missing (DEFECTLIB_SD15 names that folder): run `hf download" in lines[1]


def test_a_profile_is_told_with_what_it_needs():
    lines = {line.split()[0]: line for line in doctor._profiles()[1]}
    assert lines["demo"].endswith("needs tiny")
    assert "512 px" in lines["paper"] and "needs sd15, " in lines["paper"] and "inception" in lines["paper"]
