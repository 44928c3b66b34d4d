"""A study from its grid to its figures: one rule per stage, the runs of a stage are the business of sweep.launch.

    snakemake --cores 2                                      # grid.yaml, into results/<study>
    snakemake --cores 2 --config grid=grids/other.yaml
    snakemake --profile slurm

The plan is read when this file is, and made first if the grid is newer. Runs are no jobs here and run folders no
outputs; a stage leaves a small stamp. What is finished is never done again, whatever Snakemake thinks of it.
"""

import sys

from snakemake.exceptions import WorkflowError

from sweep import stages

GRID = config.get("grid", "grid.yaml")
try:
    STUDY = stages.ensure(GRID, config.get("results", "results"))
    STAMPS = stages.stamps(STUDY)
except ValueError as error:
    raise WorkflowError(str(error)) from None

config |= {"study": STUDY.name, "captions": stages.captions(STUDY)}  # for the report
PLAN = f"{STUDY}/plan.parquet"
RULES = list(STAMPS)


def place(wildcards, resources):
    """Where the runs of a stage are done: what a profile says with resources."""
    return stages.place(dict(resources.items()))


report: "analysis/captions/workflow.rst"


rule all:
    input:
        f"{STUDY}/figures",


for name in RULES:

    rule:
        name:
            name
        input:
            plan=PLAN,
            before=[STAMPS[earlier] for earlier in RULES[: RULES.index(name)][-1:]],
        output:
            STAMPS[name],
        handover: True
        threads: 4096  # all that there are: more than that is scaled down, here or by the launch
        resources:
            launches=1,  # without any, a handover gets the cores of a cluster's executor: None
        params:
            python=sys.executable,
            study=STUDY,
            stage=stages.RULES[name].stage,
            place=place,
            # a measurement that fails is listed, and keeps nothing else from running
            of=(
                f"--of {stages.RULES[name].of} --keep-going"
                if stages.RULES[name].of
                else ""
            ),
        shell:
            "{params.python:q} -m sweep.launch {params.study:q} --stage {params.stage}"
            " {params.of} {params.place} --cores {threads}"


rule tables:
    input:
        plan=PLAN,
        stamps=list(STAMPS.values()),
    output:
        f"{STUDY}/stamps/tables.txt",
    handover: True
    resources:
        launches=1,
    params:
        python=sys.executable,
        study=STUDY,
    shell:
        "{params.python:q} -m sweep.tables compact {params.study:q} > {output:q}"


rule figures:
    input:
        f"{STUDY}/stamps/tables.txt",
    output:
        report(
            directory(f"{STUDY}/figures"),
            patterns=["{name}.png"],
            caption="analysis/captions/figure.rst",
            category="Figures",
            labels={"figure": "{name}"},
        ),
    log:
        f"{STUDY}/logs/figures.log",
    params:
        python=sys.executable,
        study=STUDY,
    run:
        shell(
            "{params.python:q} -m analysis.figures {params.study:q} 2>&1 | tee {log:q}"
        )
