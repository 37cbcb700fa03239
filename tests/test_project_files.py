"""The files that GitHub and Docker read."""

import re
import tomllib

import pytest
import yaml

from tests.launching import ROOT

TEMPLATES = [file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml"]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_issue_templates_have_the_fields_that_github_requires(file):
    template = yaml.safe_load(file.read_text())
    assert template["name"] and template["description"]
    names = [field["id"] for field in template["body"]]
    assert len(set(names)) == len(names) > 0
    for field in template["body"]:
        assert field["type"] == "textarea" and field["attributes"]["label"]


def test_a_bug_report_needs_the_command_and_the_environment_and_asks_for_the_report():
    template = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    fields = {field["id"]: field for field in template["body"]}
    required = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert required == {"problem", "command", "environment"}
    assert "train_dft.py --env" in fields["environment"]["attributes"]["description"]
    assert "report.json" in fields["report"]["attributes"]["description"]


def test_the_citation_names_the_paper_and_the_license_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation  # dft/version.py alone has it
    assert citation["license"] == project["license"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2508.05629"


def test_the_dockerfile_copies_every_file_that_the_set_up_reads():
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"(?<=[ ])scripts/[\w.]+", re.search(r"^COPY scripts/.*$", text, re.MULTILINE)[0])
    setup = (ROOT / "scripts/setup.sh").read_text()
    used = set(re.findall(r"scripts/\w+\.py", setup)) | {"scripts/setup.sh", "scripts/environment.sh"}
    optional = {"scripts/get_model.py", "scripts/make_problems.py"}  # named in its help
    assert set(copied) == used - optional
    assert all((ROOT / file).is_file() for file in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"dft", "ds_config", "scripts", "train_dft.py", "requirements.txt"} & set(ignored)
