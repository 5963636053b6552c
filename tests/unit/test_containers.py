"""Dockerfiles and the compose file agree with the package: what they copy is there, what they call exists."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from mm_interleaved.cli.main import create_app
from mm_interleaved.serving.keys import KEY_VARIABLE

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
COMPOSE, WITH_GPU = (
    yaml.safe_load((ROOT / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml")
)


def instructions(path):
    """(name, the rest) of each instruction, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def values(path, name):
    return [rest for found, rest in instructions(path) if found == name]


def check_command(arguments):
    """Every flag is one of the command's, with values that it takes; nothing runs."""
    command = typer.main.get_command(create_app()).commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:])).params


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request):
    return request.param


def test_there_is_one_for_cpus_and_one_for_gpus():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".gpu"]


def test_what_is_copied_is_in_the_context(dockerfile):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        name for rest in values(dockerfile, "COPY") if "--from" not in rest for name in rest.split()[:-1]
    }
    assert {Path(name).name for name in copied} == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_libraries_are_the_pinned_ones_and_extras_exist(dockerfile):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [rest for rest in values(dockerfile, "RUN") if rest.startswith("pip install")]
    assert installs and all("-c constraints.txt" in rest for rest in installs)
    [named] = re.findall(r'"\.\[([\w,]+)\]"', " ".join(installs))
    assert "serve" in named.split(",") and set(named.split(",")) <= extras.keys()
    assert all("==" not in rest and ":latest" not in rest for rest in installs)


def test_an_image_runs_as_nobody_in_particular_and_says_whether_it_is_well(dockerfile):
    [user] = values(dockerfile, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    [health] = values(dockerfile, "HEALTHCHECK")
    assert "/health" in health and "--start-period" in health
    assert not re.search(r"ADD |curl|wget|hf download", dockerfile.read_text())


def test_what_an_image_starts_is_a_command_of_ours(dockerfile):
    [entry], [command] = values(dockerfile, "ENTRYPOINT"), values(dockerfile, "CMD")[-1:]
    assert yaml.safe_load(entry) == ["mm-interleaved"]
    parameters = check_command(yaml.safe_load(command))
    [port] = values(dockerfile, "EXPOSE")
    assert parameters["host"] == "0.0.0.0" and parameters["port"] == int(port)
    assert f":{port}/health" in values(dockerfile, "HEALTHCHECK")[0]


def test_the_compose_file_starts_the_server_and_a_page_that_finds_it():
    server, page = COMPOSE["services"]["server"], COMPOSE["services"]["open-webui"]
    parameters = check_command(server["command"])
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    assert (ROOT / WITH_GPU["services"]["server"]["build"]["dockerfile"]).is_file()
    assert page["environment"]["OPENAI_API_BASE_URL"] == f"http://server:{parameters['port']}/v1"
    assert page["environment"]["OPENAI_API_KEY"] == server["environment"][KEY_VARIABLE]
    assert page["depends_on"]["server"]["condition"] == "service_healthy"
    # Markdown images are fetched by the browser, from the port that the host shows.
    [shown] = server["ports"]
    assert parameters["public_url"] == f"http://localhost:{shown.split(':')[1]}"
    assert shown.endswith(f":{parameters['port']}")


def test_the_compose_file_lets_nobody_else_in_and_keeps_what_it_names():
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert {volume.split(":")[0] for volume in service["volumes"]} <= COMPOSE["volumes"].keys()
    assert COMPOSE["services"]["server"]["read_only"] and COMPOSE["services"]["server"]["cap_drop"] == ["ALL"]
    assert WITH_GPU["services"].keys() <= COMPOSE["services"].keys()
