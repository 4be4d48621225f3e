"""The files for clusters and images: what a run needs of them is there, and every command line is one that parses.

No cluster and no engine for images is asked: `REQUIRED` is what was thought through, with its reasons.
"""

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_jax.config import load_config
from dit_jax.ending import OUT_OF_MEMORY
from dit_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    FetchError,
    LostError,
    PreemptedError,
    WorkdirError,
)
from dit_jax.main import read_place
from tests.command_lines import CONFIG, commands_in, parse
from tests.launch.stand_ins import REPOSITORY

LAUNCH = REPOSITORY / "launch"
JOBSETS = ["jobset_gpu.yaml", "jobset_tpu.yaml"]
EXPORTED = {"NAME": "xl", "NODES": "4", "TOPOLOGY": "4x4", "IMAGE": "image", "CONFIG": "configs/xl.py"}
EXPORTED |= {"DATA": "hf:owner/name", "WORKDIR": "gs://bucket/xl"}

JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"
REQUIRED = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2", "the version that has failure rules"),
    "kind": ("JobSet", "a Job alone starts one pod anew, which the others have given up"),
    "spec.network.enableDNSHostnames": (True, "the headless service by which process 0 is found"),
    "spec.failurePolicy.rules.0.action": ("FailJobSet", "a mistake must not be tried a hundred times"),
    "spec.failurePolicy.rules.0.onJobFailureReasons": (["PodFailurePolicy"], "what the pods' rule gave up"),
    f"{JOB}.completionMode": ("Indexed", "the index is the process id"),
    f"{JOB}.parallelism": (4, "all at a time: none trains before all have come"),
    f"{JOB}.completions": (4, "as many as there are"),
    f"{JOB}.backoffLimit": (0, "a pod that fails is a run that starts again"),
    f"{JOB}.podFailurePolicy.rules.0.action": ("FailJob", "as JobSet's rule waits for it"),
    f"{JOB}.podFailurePolicy.rules.0.onExitCodes.operator": ("In", "these codes and no others"),
    f"{POD}.restartPolicy": ("Never", "pod failure policies need it"),
    f"{POD}.nodeSelector.cloud.google.com/gke-spot": ("true", "spot machines"),
}


def read_jobset(name: str) -> dict[str, Any]:
    return yaml.safe_load(string.Template((LAUNCH / name).read_text(encoding="utf-8")).safe_substitute(EXPORTED))


def find(tree: Any, path: str) -> Any:
    """What lies at a path of keys, which may have dots of their own, and numbers of a list's entries."""
    if not path:
        return tree
    if isinstance(tree, list):
        number, _, rest = path.partition(".")
        return find(tree[int(number)], rest)
    key = max((key for key in tree if path == key or path.startswith(f"{key}.")), key=len)
    return find(tree[key], path[len(key) + 1 :])


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_has_what_a_run_needs(name):
    jobset = read_jobset(name)
    for path, (value, reason) in REQUIRED.items():
        assert find(jobset, path) == value, f"{path}: {reason}"
    tolerated = {toleration["key"] for toleration in find(jobset, f"{POD}.tolerations")}
    assert "cloud.google.com/gke-spot" in tolerated
    (container,) = find(jobset, f"{POD}.containers")
    ((device, count),) = container["resources"]["limits"].items()
    assert device in tolerated and count > 0
    assert find(jobset, f"{POD}.terminationGracePeriodSeconds") >= 120  # a step and a save


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_starts_again_where_that_helps(name):
    given_up = set(find(read_jobset(name), f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values"))
    hopeless = (ConfigError, DataError, DivergedError, CheckpointError, WorkdirError)
    assert given_up == {error.exit_code for error in hopeless} | {OUT_OF_MEMORY}
    assert not given_up & {0, LostError.exit_code, PreemptedError.exit_code, FetchError.exit_code, 137, 143}


@pytest.mark.parametrize("name", JOBSETS)
def test_the_arguments_of_a_pod_are_those_of_the_program(name):
    jobset = read_jobset(name)
    arguments = [a.replace("$(JOB_COMPLETION_INDEX)", "3") for a in find(jobset, f"{POD}.containers.0.args")]
    assert not any("$" in argument for argument in arguments)
    parse("main", arguments)
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    if flags["coordinator"] != "auto":
        place = read_place(flags["coordinator"], int(flags["num_processes"]), int(flags["process_id"]))
        jobs = jobset["spec"]["replicatedJobs"][0]["name"]
        host = f"{jobset['metadata']['name']}-{jobs}-0-0.{jobset['metadata']['name']}"  # as JobSet calls its first pod
        assert place == (f"{host}:1234", find(jobset, f"{JOB}.parallelism"), 3)
    assert load_config(str(REPOSITORY / flags["config"]), {"data.source": flags["config.data.source"]})


def test_gpus_find_room_in_shared_memory():
    pod = find(read_jobset("jobset_gpu.yaml"), POD)
    (mount,) = pod["containers"][0]["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"} and volume["emptyDir"] == {"medium": "Memory"}


@pytest.mark.parametrize("name", JOBSETS)
def test_all_that_a_jobset_asks_for_is_exported_by_its_head(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    head, body = text.split("apiVersion", 1)
    assert set(re.findall(r"\$\{(\w+)\}", body)) == set(
        re.findall(r"\b([A-Z]+)=", "".join(re.findall("export.*", head)))
    )


def test_skypilot_goes_on_by_itself_from_a_bucket():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    resources = task["resources"]
    assert resources["use_spot"] is True and resources["infra"] == "gcp"  # whose buckets a workdir may be in
    assert set(resources["job_recovery"]["recover_on_exit_codes"]) == {LostError.exit_code, PreemptedError.exit_code}
    given = {name for name, value in task["envs"].items() if value is None}
    assert given == {"WORKDIR", "CONFIG", "DATA"} and all(
        f"--env {name}=" in text_of("skypilot.yaml") for name in given
    )
    assert set(re.findall(r"\$([A-Z]+)\b", task["setup"] + task["run"])) == set(task["envs"])
    assert Path(REPOSITORY, re.search(r"source (\S+)", task["setup"])[1]).is_file()
    ((program, arguments),) = commands_in(task["run"])
    assert program == "main" and {argument.partition("=")[0] for argument in arguments} == {
        *("--config", "--config.data.source", "--workdir", "--coordinator", "--num_processes", "--process_id")
    }


def text_of(name: str) -> str:
    return (LAUNCH / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".txt"))
def test_every_command_of_a_launch_file_is_one_that_parses(name):
    for program, arguments in commands_in(text_of(name)):
        needs = program == "main" and not any(argument.startswith("--config=") for argument in arguments)
        parse(program, [*arguments, *([CONFIG] if needs else [])])
    shown = re.findall(
        r"^#[^\n]*?((?: --(?!zone)[\w.]+=[^\s\\]+)* --config=.*)$", text_of(name).replace("\\\n#", ""), re.MULTILINE
    )
    for words in shown:  # in a comment: what the script or the image hands on to the training program
        parse("main", words.split("   ")[0].split())


# --- the image ----------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, line by line: instruction and arguments."""
    lines = [line for line in text_of("Dockerfile").splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_runs_the_program_as_somebody_who_is_not_root_on_a_python_that_will_do():
    found = instructions()
    names = [name for name, _ in found]
    assert names[0] == "FROM" and names.count("FROM") == 1
    base, tag = found[0][1].split(":")
    assert base == "python" and re.fullmatch(r"3\.1[1-4]-slim-\w+", tag)
    assert names[-1] == "ENTRYPOINT" and yaml.safe_load(found[-1][1]) == ["python", "-m", "dit_jax.main"]
    (user,) = (value for name, value in found if name == "USER")
    assert int(user) > 0 and f"useradd --uid {user} " in text_of("Dockerfile")
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert set(names) <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}  # no ADD
    for name, value in found:
        assert not (name in ("ARG", "ENV") and re.search("KEY|TOKEN|PASSWORD|SECRET", value)), value


def test_what_the_image_copies_is_there_and_nothing_else_reaches_the_engine():
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {source for name, value in instructions() if name == "COPY" for source in value.split()[:-1]}
    assert all((REPOSITORY / source).exists() for source in copied | let_in)
    assert {source.split("/")[0] for source in copied} == let_in


def test_the_image_installs_extras_that_there_are():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    asked = re.findall(r"EXTRAS(?:=|: )([\w,]+)", "".join(map(text_of, ["Dockerfile", *JOBSETS, "skypilot.yaml"])))
    asked += re.findall(r"install_into .venv ([\w,]+)", text_of("tpu_vm.sh"))
    assert len(asked) == 5
    for extras in asked:
        assert set(extras.split(",")) <= set(setup["options.extras_require"]) and "gcs" in extras  # the bucket's
