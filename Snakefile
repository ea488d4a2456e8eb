# Fine-tune open language models with QLoRA, compare each with its base, report.
# One rules file a stage, in the order in which they run; what is run stands in config/config.yaml.
from snakemake.utils import min_version

min_version("9.27")


configfile: "config/models.yaml"
configfile: "config/datasets.yaml"
configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/build.smk"
include: "rules/download.smk"
include: "rules/preflight.smk"
include: "rules/format.smk"
include: "rules/concatenate.smk"
include: "rules/tokenize.smk"
include: "rules/train.smk"
include: "rules/predict.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/merge.smk"
include: "rules/gguf.smk"
include: "rules/publish.smk"
include: "rules/export.smk"


localrules:
    all,


onsuccess:
    trim(Path(FINISHED), config["finished_runs"])


rule all:
    input:
        f"{RESULTS}/report/index.html",
        f"{RESULTS}/metrics.csv",
        collect(f"{RESULTS}/runs/{{run}}/adapter", run=RUNS),
    message:
        f"all done: {RESULTS}/report/index.html"
