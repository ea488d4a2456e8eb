# What the rules files share: the checked configuration, the names of what is run, and where things lie.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = Path(workflow.basedir) / "scripts"
sys.path.append(str(SCRIPTS))
from qlora.code_hash import code_hash
from qlora.config import check_pinned, checked_config, resolved_device, results_folder
from qlora.errors import UserError
from qlora.files import files_below
from qlora.finished import trim
from qlora.licences import source_of
from qlora.locks import HELD, RESULTS_LOCK, locked
from qlora.pins import needed_files


def used(kind):
    """Names of the models, mixtures or datasets that the runs and suites need, in the order of the config."""
    if kind == "datasets":
        trained = [name for mixture in used("mixtures") for name in config["mixtures"][mixture]["datasets"]]
        tested = [name for suite in config["suites"].values() for name in suite["datasets"]]
        return list(dict.fromkeys(trained + tested))
    return list(dict.fromkeys(run[kind.removesuffix("s")] for run in config["runs"]))


try:
    if HELD not in os.environ:
        own_lock = locked(RESULTS_LOCK, shared=True)  # as long as this Snakemake lives
        if Path(".snakemake/restoring").exists():
            raise UserError("make restore was cut off here: run it again")
    config = checked_config(config)
    for kind in ("models", "datasets"):
        for name in used(kind):
            check_pinned(kind, name, config[kind][name]["source"])
except UserError as error:
    raise WorkflowError(str(error)) from None

RESULTS = results_folder(config)
FINISHED = "results/finished"
RUNS = {run["name"]: run for run in config["runs"]}
BUILT = [name for name in used("models") if "build" in config["models"][name]["source"]]
DEVICE = resolved_device(config["device"])
GPUS = 1 if DEVICE == "cuda" else 0
CPU_THREADS = config["threads"]

# What is evaluated, as it stands in the paths of predictions and metrics: the bases and the runs on each suite.
SUBJECTS = [
    f"{suite}/{subject}"
    for suite in config["suites"]
    for subject in [*(f"base/{model}" for model in used("models")), *(f"tuned/{run}" for run in RUNS)]
]


wildcard_constraints:
    run="|".join(RUNS),
    model="|".join(used("models")),
    mixture="|".join(used("mixtures")),
    dataset="|".join(used("datasets")),
    suite="|".join(config["suites"]),


def files_of(kind, name):
    """The local files of a source; none for a hub source."""
    source = config[kind][name]["source"]
    return [str(path) for path in files_below(Path(source["path"]))] if "path" in source else []


def local_files_of_model(wildcards):
    """The files of a model that lies on this machine, so that a change in them is seen; none for a hub model."""
    return files_of("models", wildcards.model)


def local_files_of_dataset(wildcards):
    """The files of a dataset that lies on this machine; none for a hub dataset."""
    return files_of("datasets", wildcards.dataset)


def value_at(path, within):
    """A function for params: the value at a path of keys, its wildcards filled in.

    (Snakemake's own `lookup` walks the whole tree each time: a thousand runs took minutes to plan.)
    """

    def value(wildcards):
        found = within
        for key in path.split("/"):
            found = found[key.format(**wildcards)]
        return found

    return value


def code_of(script):
    """The hash over the code of a stage's script, as a param: an edit re-runs what uses it, a comment nothing."""
    return code_hash(SCRIPTS / script)


def base_of(wildcards):
    """The registry's entry of the base model that a job is about, by its own name or by its run's."""
    name = wildcards.get("model") or RUNS[wildcards.run]["model"]
    return config["models"][name]


def form_of(wildcards):
    """The named prompt format of a job's model, or None where its tokenizer's chat template renders."""
    name = base_of(wildcards)["format"]
    return config["formats"][name] if name else None


def attention_of(wildcards):
    """The attention implementation of a job's model."""
    return base_of(wildcards)["attention"]


def system_of(wildcards):
    """Where a system message goes in the prompts of a job's model."""
    return base_of(wildcards)["system"]


def base_name_of(wildcards):
    """What a run's base model is called on the hub, or its folder where it is not from there."""
    return base_of(wildcards)["source"].get("hub", model_of(wildcards))


def licensed(models, datasets):
    """What is told of models and datasets: where each is from, its pin and its licence."""
    names = [*(("model", name) for name in models), *(("dataset", name) for name in datasets)]
    return [source_of(kind, name, config[f"{kind}s"][name]) for kind, name in names]


def sources_of(wildcards):
    """The base and the datasets that a run is made from, with their licences."""
    run = RUNS[wildcards.run]
    return licensed([run["model"]], config["mixtures"][run["mixture"]]["datasets"])


def command_for(target):
    """The command that makes a target as it is configured here."""
    overlays = " ".join(os.path.relpath(path) for path in workflow.config_settings.configfiles)
    overlay = f" --configfile {overlays}" if overlays else ""
    return f".venv/bin/snakemake --cores all {target}{overlay}"


def commands_of(wildcards):
    """The commands that put a run's base where it is needed, and that train the run."""
    adapter = f"{RESULTS}/runs/{wildcards.run}/adapter"
    return {"base": command_for(model_of(wildcards)), "adapter": command_for(adapter)}


def model_of(wildcards):
    """Folder of the base model of a run."""
    return f"results/sources/models/{RUNS[wildcards.run]['model']}"


def merged_of(wildcards):
    """A run's merged model, where it is there or asked for."""
    merged = f"{RESULTS}/runs/{wildcards.run}/merged"
    return {"merged": merged} if config["merged"] or Path(merged).exists() else {}


def preflight_of(wildcards):
    """What the preflight of a run's base model found."""
    return f"{RESULTS}/preflight/{RUNS[wildcards.run]['model']}.json"


def targets_of(wildcards):
    """What the runs of a model give adapters to, each once: so another run with the same targets changes no report.

    So no rule has to take the report as `ancient`, with which Snakemake 9.27 leaves out a new run's jobs while a
    preflight is due.
    """
    wanted = [run["settings"]["lora"]["target_modules"] for run in RUNS.values() if run["model"] == wildcards.model]
    return [target for place, target in enumerate(wanted) if target not in wanted[:place]]


def with_system_of(wildcards):
    """Whether a dataset that a model is trained on declares a system message; one in a column shows while tokenising."""
    mixtures = [config["mixtures"][run["mixture"]] for run in RUNS.values() if run["model"] == wildcards.model]
    return any("system" in config["datasets"][name] for mixture in mixtures for name in mixture["datasets"])


def tokens_of(wildcards):
    """Folder of the tokenised mixture of a run."""
    run = RUNS[wildcards.run]
    return f"{RESULTS}/tokens/{run['model']}/{run['mixture']}"


def datasets_of(wildcards):
    """Folders of the formatted datasets of a suite."""
    return collect("results/datasets/{dataset}", dataset=config["suites"][wildcards.suite]["datasets"])


def needed_files_of(kind):
    """A function for params: globs of the files that are needed of a source on the hub."""

    def globs(wildcards):
        return needed_files(kind, config[kind][wildcards.get(kind.removesuffix("s"))])

    return globs


def datasets_of_mixture(wildcards):
    """Folders of the formatted datasets of a mixture."""
    return collect("results/datasets/{dataset}", dataset=config["mixtures"][wildcards.mixture]["datasets"])


def datasets_of_suites(wildcards):
    """Folders of the formatted datasets that the runs are evaluated on: a mixture may hold none of their prompts."""
    tested = [name for suite in config["suites"].values() for name in suite["datasets"]]
    return collect("results/datasets/{dataset}", dataset=list(dict.fromkeys(tested)))


def shots_of(wildcards):
    """Examples in the prompt of the few-shot baseline; 0 where the suite does not ask for it."""
    suite = config["suites"][wildcards.suite]
    return suite["shots"] if "few_shot" in suite["baselines"] else 0


def tasks_of(wildcards):
    """Dataset → what its answers are judged by, for a suite."""
    datasets = config["suites"][wildcards.suite]["datasets"]
    return {name: {key: config["datasets"][name][key] for key in ("task", "trivial")} for name in datasets}
