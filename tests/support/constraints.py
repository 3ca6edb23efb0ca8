"""Manifests that each constraint of a PylonJob accepts and rejects, for the models and for the API server alike.

Bounds, enums and types come from the schema itself, so that no field is forgotten; rules that span fields, patterns and
immutability are written out by hand.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pylon_api import names
from pylon_api.crd import root_schema

Json = dict[str, Any]
Path = str
"""A field as Kubernetes writes it: `spec.failurePolicy.rules[0].exitCodes[0]`."""


def minimal_job() -> Json:
    """The least that a person must write."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "example", "namespace": "default"},
        "spec": {"training": {"data": {"train": ["python://stdlib/**/*.py"]}, "schedule": {"steps": 100}}},
    }


def full_job() -> Json:
    """A job that sets every optional object and one item of every list, so that each field has a place."""
    job = minimal_job()
    job["spec"] |= {
        "failurePolicy": {"rules": [{"action": "Restart", "exitCodes": [3], "podReasons": ["Evicted"]}]},
        "scheduling": {},
        "topology": {"levels": ["topology.kubernetes.io/zone"]},
    }
    job["spec"]["training"] |= {
        "model": {},
        "optimizer": {"lookahead": {}},
        "batch": {},
        "gating": {},
        "consensus": {},
        "checkpoint": {"uri": "./runs", "local": {"directory": "/var/pylon"}, "restoreFrom": {"uri": "./other"}},
        "evaluation": {},
        "export": {},
    }
    job["spec"]["training"]["data"] |= {"heldOut": ["held-out/*.txt"], "tokenizer": {}}
    return job


@dataclass(frozen=True)
class Case:
    """`changes` laid over a full job; `problem` is None when it must be accepted, else what the error must say."""

    name: str
    changes: dict[Path, Any]
    problem: str | None = None

    def manifest(self) -> Json:
        job = full_job()
        for path, value in self.changes.items():
            put(job, path, value)
        return job


REMOVED = object()
"""Stands for a field that is taken away."""


def put(job: Json, path: Path, value: Any) -> None:
    """Set or remove one field in place."""
    *parents, last = [int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"\[\d+\]|[^.\[]+", path)]
    node: Any = job
    for part in parents:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    if value is REMOVED:
        del node[last]
    else:
        node[last] = copy.deepcopy(value)


ADAPTATION = "spec.training.model.resonate.adaptation"

# What else must hold for a boundary value to be acceptable.
COMPANIONS: dict[Path, dict[Path, Any]] = {
    "spec.nodes": {"spec.training.batch.sequences": 4096},
    "spec.gpusPerNode": {"spec.training.batch.sequences": 64},
    "spec.processesPerNode": {"spec.training.batch.sequences": 256},
    "spec.training.model.heads": {"spec.training.model.hiddenSize": 65536},
    "spec.training.model.hiddenSize": {"spec.training.model.heads": 1},
    "spec.training.model.kvHeads": {"spec.training.model.heads": 1024, "spec.training.model.hiddenSize": 65536},
    **{
        f"spec.training.model.resonate.{field}": {"spec.training.model.architecture": "Resonate"} | beside
        for field, beside in {
            "stateSize": {},
            "headWidth": {},
            "expand": {},
            "convWidth": {},
            "groups": {"spec.training.model.resonate.headWidth": 1},
            "chunkTokens": {},
            "attentionEvery": {},
            "longConvolutionEvery": {},
            "activation": {},
            "binlopMinimumSlope": {},
            "scanKernel": {},
            "control": {},
            "control.outerEverySteps": {},
            "control.vectorSize": {},
            "stability": {},
            "stability.branchNormLimit": {},
        }.items()
    },
    **{
        f"{ADAPTATION}.{field}": {"spec.training.model.architecture": "Resonate"} | beside
        for field, beside in {
            "base": {},
            "baseSeed": {},
            "rank": {f"{ADAPTATION}.maximumRank": 4096, "spec.training.model.hiddenSize": 8192},
            "maximumRank": {f"{ADAPTATION}.rank": 1, "spec.training.model.hiddenSize": 8192},
            "growEverySteps": {},
            "unfreezeStep": {f"{ADAPTATION}.base": "Dense"},
            "baseSyncSteps": {},
            "codebook.subKeys": {f"{ADAPTATION}.codebook.topK": 1},
            "codebook.width": {},
            "codebook.topK": {},
            "codebook.reviveEverySteps": {},
        }.items()
    },
    "spec.training.optimizer.momentum": {"spec.training.optimizer.name": "Muon"},
    "spec.training.optimizer.curvatureSteps": {"spec.training.optimizer.name": "Sophia"},
    "spec.training.schedule.tokens": {"spec.training.schedule.steps": REMOVED},
    "spec.training.gating.routerLayers": {
        "spec.training.gating.granularity": "Sequence",
        "spec.training.model.layers": 1024,
    },
    "spec.training.gating.finalTokenRatio": {
        "spec.training.gating.ratioControl": "Fixed",
        "spec.training.gating.tokenRatio": 1,
        "spec.training.gating.decaySteps": 1,
    },
    "spec.training.gating.decaySteps": {
        "spec.training.gating.ratioControl": "Fixed",
        "spec.training.gating.finalTokenRatio": 0.25,
    },
    "spec.training.gating.maximumTokenRatio": {"spec.training.gating.minimumTokenRatio": 1e-9},
    "spec.training.gating.kvGradient": {"spec.training.gating.engine": "SinglePass"},
    "spec.training.gating.rowActivations": {"spec.training.gating.engine": "SinglePass"},
    "spec.training.gating.depthBuckets": {"spec.training.gating.engine": "SinglePass"},
    "spec.training.gating.leakRate": {
        "spec.training.gating.engine": "SinglePass",
        "spec.training.gating.depthBuckets": 2,
    },
    "spec.training.consensus.bytesPerStep": {"spec.training.consensus.codec": "Auto"},
    "spec.training.consensus.everySteps": {"spec.training.consensus.codec": "Dct"},
    "spec.training.consensus.localSteps": {"spec.training.optimizer.lookahead": REMOVED},
    "spec.training.data.tokenizer.kind": {"spec.training.data.tokenizer.uri": "t.json"},
    "spec.training.data.tokenizer.uri": {"spec.training.data.tokenizer.kind": "File"},
}

FORBIDS_ITS_COMPANION: list[tuple[Path, Any]] = [
    ("spec.training.data.tokenizer.kind", "Bytes"),
    ("spec.training.gating.decaySteps", 0),
]
"""Values inside their bounds that do not go with their field's companions; rule cases have them."""


def schema_cases() -> Iterator[Case]:
    """For each field of the spec: the last values inside its bounds, the first outside, a wrong type, a stranger."""
    for path, node in _fields(root_schema()["properties"]["spec"], "spec"):
        beside = COMPANIONS.get(path, {})
        for value in _inside(node):
            if (path, value) in FORBIDS_ITS_COMPANION:
                continue
            yield Case(f"{path}={_short(value)}", {**beside, path: value})
        for value in _outside(node):
            yield Case(f"{path}={_short(value)}", {**beside, path: value}, problem=path)
        if "properties" in node:
            yield Case(f"{path}.stranger", {f"{path}.stranger": 1}, problem="stranger")
            for required in node.get("required", []):
                yield Case(f"{path}.{required} absent", {f"{path}.{required}": REMOVED}, problem=f"{path}.{required}")


def _fields(node: Json, path: Path) -> Iterator[tuple[Path, Json]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _fields(child, f"{path}.{name}")
    if "items" in node:
        yield from _fields(node["items"], f"{path}[0]")


def _inside(node: Json) -> Iterator[Any]:
    if "enum" in node:
        yield from node["enum"]
    elif node["type"] == "boolean":
        yield from (True, False)
    elif node["type"] in ("integer", "number"):
        step = 1 if node["type"] == "integer" else 1e-9
        if "minimum" in node:
            yield node["minimum"] + (step if node.get("exclusiveMinimum") else 0)
        if "maximum" in node:
            yield node["maximum"] - (step if node.get("exclusiveMaximum") else 0)
    elif node["type"] == "string" and "pattern" not in node:
        yield from ("x" * node[bound] for bound in ("minLength", "maxLength") if bound in node)
    elif node["type"] == "array":
        yield from ([_sample(node["items"])] * node[bound] for bound in ("minItems", "maxItems") if bound in node)


def _outside(node: Json) -> Iterator[Any]:
    yield {"integer": "1", "number": "1", "boolean": "true", "string": 1, "array": "x", "object": "x"}[node["type"]]
    if "enum" in node:
        yield "Stranger"
    if node["type"] == "integer":
        yield 1.5
    if "minimum" in node:
        yield node["minimum"] - (0 if node.get("exclusiveMinimum") else 1)
    if "maximum" in node:
        yield node["maximum"] + (0 if node.get("exclusiveMaximum") else 1)
    if node.get("minLength"):
        yield ""
    if "maxLength" in node:
        yield "x" * (node["maxLength"] + 1)
    if node.get("minItems"):
        yield []
    if "maxItems" in node:
        yield [_sample(node["items"])] * (node["maxItems"] + 1)


def _sample(node: Json) -> Any:
    if "enum" in node:
        return node["enum"][0]
    if node["type"] == "object":
        return {"action": "Restart", "exitCodes": [3]}  # the only list of objects is failurePolicy.rules
    return node["minimum"] if node["type"] == "integer" else "x"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:12]}...({len(value)})"


TRAINING = "spec.training"
TOKENIZER = f"{TRAINING}.data.tokenizer"
CONSENSUS = "spec.training.consensus"
OPTIMIZER = f"{TRAINING}.optimizer"
GATING = f"{TRAINING}.gating"
FALLING = {"ratioControl": "Fixed", "tokenRatio": 0.5, "finalTokenRatio": 0.25, "decaySteps": 100}
EXPORT = {"format": "HuggingFace"}
NAME = "metadata.name"
RESTORE = f"{TRAINING}.checkpoint.restoreFrom"
CHECKPOINT = "step-000000000500-attempt-000001-0a1b2c3d"

RULE_CASES = [
    Case("the minimal job's parts are all optional", {}),
    # Names
    Case("a name at the limit", {NAME: "x" * names.MAX_JOB_NAME_LENGTH}),
    Case("a name beyond the limit", {NAME: "x" * (names.MAX_JOB_NAME_LENGTH + 1)}, NAME),
    Case("a name with digits and dashes", {NAME: "a-1-b2"}),
    Case("a name that starts with a digit", {NAME: "1a"}, NAME),
    Case("a name with a dot", {NAME: "a.b"}, NAME),
    # Patterns
    Case("a resource without a domain", {"spec.gpuResourceName": "gpu"}),
    Case("a resource with a domain", {"spec.gpuResourceName": "amd.com/gpu"}),
    Case("a resource with two slashes", {"spec.gpuResourceName": "a/b/c"}, "spec.gpuResourceName"),
    Case("a resource with a space", {"spec.gpuResourceName": "a b"}, "spec.gpuResourceName"),
    Case("another controller", {"spec.managedBy": "kueue.x-k8s.io/multikueue"}),
    Case("a controller with a capital domain", {"spec.managedBy": "Kueue/x"}, "spec.managedBy"),
    Case("a level that is a label key", {"spec.topology.levels": ["example.com/Rack_1.a"]}),
    Case("a level that is none", {"spec.topology.levels": ["-rack"]}, "spec.topology.levels[0]"),
    # Rules that span fields
    Case("batch splits over nodes", {"spec.nodes": 4, f"{TRAINING}.batch.sequences": 8}),
    Case("batch does not split", {"spec.nodes": 3, f"{TRAINING}.batch.sequences": 8}, "divisible by the number"),
    Case("the default batch does not split over GPUs", {"spec.gpusPerNode": 5}, "divisible by the number"),
    Case("processes count before GPUs", {"spec.gpusPerNode": 5, "spec.processesPerNode": 2}),
    Case(
        "batch does not split over processes",
        {"spec.nodes": 2, "spec.processesPerNode": 3, f"{TRAINING}.batch.sequences": 8},
        "divisible by the number",
    ),
    Case("hiddenSize does not split", {f"{TRAINING}.model": {"hiddenSize": 100, "heads": 3}}, "divisible by 2 x heads"),
    Case("hiddenSize over heads is odd", {f"{TRAINING}.model": {"hiddenSize": 12, "heads": 4}}, "by 2 x heads"),
    Case("grouped heads", {f"{TRAINING}.model": {"heads": 4, "kvHeads": 2}}),
    Case("grouped heads do not split", {f"{TRAINING}.model": {"heads": 4, "kvHeads": 3}}, "divisible by kvHeads"),
    Case("Resonate as it is", {f"{TRAINING}.model": {"architecture": "Resonate"}}),
    Case(
        "Resonate in small",
        {f"{TRAINING}.model": {"architecture": "Resonate", "hiddenSize": 24, "resonate": {"headWidth": 16}}},
    ),
    Case("details of another architecture", {f"{TRAINING}.model": {"resonate": {}}}, "goes with architecture Resonate"),
    Case(
        "channels that do not split into the default heads",
        {f"{TRAINING}.model": {"architecture": "Resonate", "hiddenSize": 40}},
        "must be divisible by resonate.headWidth",
    ),
    Case(
        "channels that do not split into heads",
        {f"{TRAINING}.model": {"architecture": "Resonate", "resonate": {"headWidth": 48}}},
        "must be divisible by resonate.headWidth",
    ),
    Case(
        "heads that do not split into groups",
        {f"{TRAINING}.model": {"architecture": "Resonate", "resonate": {"groups": 3}}},
        "divisible by resonate.groups",
    ),
    Case("adaptation as it is", {f"{TRAINING}.model": {"architecture": "Resonate", "resonate": {"adaptation": {}}}}),
    Case(
        "a codebook as it is",
        {f"{TRAINING}.model": {"architecture": "Resonate", "resonate": {"adaptation": {"codebook": {}}}}},
    ),
    Case(
        "as many ranks as hiddenSize",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"maximumRank": 128}},
        "fewer ranks",
    ),
    Case(
        "more ranks at first than at last",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"rank": 16, "maximumRank": 8}},
        "must not exceed maximumRank",
    ),
    Case(
        "as many ranks as hiddenSize that do not grow",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"rank": 128, "growEverySteps": 0}},
        "fewer ranks",
    ),
    Case(
        "ranks that do not grow",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"rank": 64, "growEverySteps": 0}},
    ),
    Case(
        "more atoms to choose than sub-keys",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"codebook": {"topK": 5, "subKeys": 4}}},
        "must not exceed subKeys",
    ),
    Case(
        "an odd width of atoms",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"codebook": {"width": 63}}},
        "must be a multiple of 4",
    ),
    Case(
        "dense weights that will learn",
        {
            f"{TRAINING}.model.architecture": "Resonate",
            ADAPTATION: {"base": "Dense", "unfreezeStep": 0},
            RESTORE: REMOVED,
        },
    ),
    Case(
        "generated weights that would learn",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"base": "Seed", "unfreezeStep": 0}},
        "unfreezeStep needs base Dense",
    ),
    Case(
        "recorded steps in which more comes to learn",
        {
            f"{TRAINING}.model.architecture": "Resonate",
            f"{TRAINING}.compile": "Graph",
            ADAPTATION: {"base": "Dense", "unfreezeStep": 10},
        },
        "needs compile Default or Disabled",
    ),
    Case(
        "a base that will learn without its curvature",
        {
            f"{TRAINING}.model.architecture": "Resonate",
            f"{TRAINING}.optimizer.name": "Sophia",
            ADAPTATION: {"base": "Dense", "unfreezeStep": 10},
        },
        "an optimizer other than Sophia",
    ),
    Case(
        "dense weights from nowhere",
        {f"{TRAINING}.model.architecture": "Resonate", ADAPTATION: {"base": "Dense"}, RESTORE: REMOVED},
        "needs checkpoint.restoreFrom",
    ),
    *(
        Case(
            f"an export with {', '.join(own) or 'nothing of its own'}",
            {f"{TRAINING}.model": {"architecture": "Resonate", "resonate": own}, f"{TRAINING}.export": EXPORT},
            problem,
        )
        for own, problem in [
            ({}, None),
            ({"attentionEvery": 0, "headWidth": 32, "adaptation": {}}, None),
            *(
                (own, "export.format HuggingFace needs model.resonate")
                for own in (
                    {"longConvolutionEvery": 2},
                    {"groups": 2},
                    {"activation": "Gelu"},
                    {"control": {}},
                    {"stability": {}},
                    {"adaptation": {"codebook": {}}},
                )
            ),
        ]
    ),
    Case(
        "an export of Resonate as it is", {f"{TRAINING}.model.architecture": "Resonate", f"{TRAINING}.export": EXPORT}
    ),
    Case("bytes", {TOKENIZER: {"kind": "Bytes"}}),
    Case("bytes with a uri", {TOKENIZER: {"kind": "Bytes", "uri": "t.json"}}, "uri goes with kind File"),
    Case("a uri alone", {TOKENIZER: {"uri": "t.json"}}, "uri goes with kind File"),
    Case("a file without a uri", {TOKENIZER: {"kind": "File"}}, "uri goes with kind File"),
    Case("moments of AdamW", {OPTIMIZER: {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6}}),
    Case("a momentum of Muon", {OPTIMIZER: {"name": "Muon", "momentum": 0.9, "beta1": 0.8, "epsilon": 1e-6}}),
    Case("a curvature", {OPTIMIZER: {"name": "Sophia", "curvatureSteps": 5, "beta2": 0.98}}),
    Case("a curvature of AdamW", {OPTIMIZER: {"curvatureSteps": 5}}, "curvatureSteps goes with Sophia"),
    Case(
        "a curvature in few bytes",
        {OPTIMIZER: {"name": "Sophia"}, CONSENSUS: {"codec": "Int8"}},
        "optimizer Sophia needs consensus.codec Exact",
    ),
    Case("a momentum of AdamW", {OPTIMIZER: {"momentum": 0.9}}, "momentum goes with Muon"),
    Case("an epsilon of Lion", {OPTIMIZER: {"name": "Lion", "epsilon": 1e-6}}, "epsilon goes with AdamW, Muon"),
    *(
        Case(f"{field} of Adafactor", {OPTIMIZER: {"name": "Adafactor", field: 0.5}}, f"{field} goes with AdamW,")
        for field in ("beta1", "beta2", "epsilon")
    ),
    Case("steps", {f"{TRAINING}.schedule": {"steps": 1}}),
    Case("tokens", {f"{TRAINING}.schedule": {"tokens": 1}}),
    Case("steps and tokens", {f"{TRAINING}.schedule": {"steps": 1, "tokens": 1}}, "exactly one of steps and tokens"),
    Case("neither steps nor tokens", {f"{TRAINING}.schedule": {}}, "exactly one of steps and tokens"),
    Case("export below the checkpoints", {f"{TRAINING}.export": EXPORT}),
    Case(
        "export nowhere",
        {f"{TRAINING}.export": EXPORT, f"{TRAINING}.checkpoint": REMOVED},
        "export needs export.uri or checkpoint.uri",
    ),
    Case(
        "export on its own",
        {f"{TRAINING}.export": {"format": "HuggingFace", "uri": "./e"}, f"{TRAINING}.checkpoint": REMOVED},
    ),
    Case("checkpoints by cost", {f"{TRAINING}.checkpoint": {"uri": "./r", "intervalControl": "YoungDaly"}}),
    Case("checkpoints by the clock", {f"{TRAINING}.checkpoint": {"uri": "./r", "intervalSeconds": 60}}),
    Case("checkpoints on local disks", {f"{TRAINING}.checkpoint": {"uri": "./r", "local": {"directory": "/ssd"}}}),
    Case(
        "checkpoints on local disks somewhere",
        {f"{TRAINING}.checkpoint": {"uri": "./r", "local": {"directory": "ssd"}}},
        f"{TRAINING}.checkpoint.local.directory",
    ),
    Case("a gate by its score alone", {GATING: {"strategy": "GradientNorm"}}),
    Case("a gate of before the closed loop", {GATING: {"strategy": "GradientNorm", "tokenRatio": 0.25}}),
    Case("an unknown score", {GATING: {"strategy": "Luck"}}, f"{GATING}.strategy"),
    Case("ratios in order", {GATING: {"minimumTokenRatio": 0.25, "maximumTokenRatio": 0.25}}),
    Case(
        "ratios out of order",
        {GATING: {"minimumTokenRatio": 0.5, "maximumTokenRatio": 0.25}},
        "must not exceed maximumTokenRatio",
    ),
    Case("no decay", {GATING: {"decaySteps": 0}}),
    Case("a falling ratio", {GATING: FALLING}),
    Case("a falling ratio without steps", {GATING: FALLING | {"decaySteps": 0}}, "decaySteps go together"),
    Case("steps without a falling ratio", {GATING: {"decaySteps": 5}}, "decaySteps go together"),
    Case("a ratio that would rise", {GATING: FALLING | {"tokenRatio": 0.2}}, "must not exceed tokenRatio"),
    Case("two hands on the ratio", {GATING: FALLING | {"ratioControl": "GradientMass"}}, "needs ratioControl Fixed"),
    Case("depth tiers", {GATING: {"engine": "SinglePass", "depthBuckets": 4, "leakRate": 0.1}}),
    Case("depth tiers of the head", {GATING: {"engine": "HeadOnly", "depthBuckets": 2}}, "SinglePass or TwoPass"),
    Case("a dense gradient", {GATING: {"engine": "SinglePass", "kvGradient": "Dense", "rowActivations": "Recompute"}}),
    Case("a dense gradient in two passes", {GATING: {"engine": "TwoPass", "kvGradient": "Dense"}}, "needs engine Si"),
    Case("a dense gradient of the head", {GATING: {"kvGradient": "Dense"}}, "kvGradient Dense needs engine SinglePass"),
    Case("two passes that recompute", {GATING: {"engine": "TwoPass", "rowActivations": "Recompute"}}),
    Case("a head that recomputes", {GATING: {"rowActivations": "Recompute"}}, "needs engine SinglePass or TwoPass"),
    Case("a leak without tiers", {GATING: {"engine": "SinglePass", "leakRate": 0.1}}, "leakRate needs depthBuckets"),
    Case("a budget", {CONSENSUS: {"codec": "Auto", "bytesPerStep": 1000}}),
    Case(
        "a budget for all there is", {CONSENSUS: {"bytesPerStep": 1000}}, "bytesPerStep needs a codec other than Exact"
    ),
    Case("integers in turns", {CONSENSUS: {"codec": "Int4", "everySteps": 8}}),
    Case("signs in turns", {CONSENSUS: {"codec": "Sign", "everySteps": 8}}),
    Case("a sketch in turns", {CONSENSUS: {"codec": "Sketch", "everySteps": 8}}, "everySteps needs codec Auto, Int8"),
    Case(
        "local steps",
        {
            CONSENSUS: {"codec": "Sign", "localSteps": 8, "outerRate": 1, "outerMomentum": 0},
            "spec.training.optimizer.lookahead": REMOVED,
        },
    ),
    Case(
        "local steps and slow weights",
        {f"{TRAINING}.optimizer": {"lookahead": {}}, CONSENSUS: {"localSteps": 8}},
        "lookahead needs consensus.localSteps 1",
    ),
    Case("local steps of a sketch", {CONSENSUS: {"codec": "Sketch", "localSteps": 8}}, "localSteps needs codec Auto"),
    Case(
        "local steps in turns",
        {CONSENSUS: {"codec": "Int4", "localSteps": 8, "everySteps": 2}},
        "leave everySteps at 1",
    ),
    Case("whole sequences", {GATING: {"granularity": "Sequence", "selection": "Top", "routerLayers": 2}}),
    Case(
        "whole sequences row by row",
        {GATING: {"granularity": "Sequence", "engine": "TwoPass"}},
        "granularity Sequence needs engine HeadOnly",
    ),
    Case(
        "a quota per sequence of sequences",
        {GATING: {"granularity": "Sequence", "selection": "SequenceAware"}},
        "granularity Sequence needs selection Sampled or Top",
    ),
    Case("a router for tokens", {GATING: {"routerLayers": 2}}, "routerLayers needs granularity Sequence"),
    Case(
        "a router above the model",
        {GATING: {"granularity": "Sequence", "routerLayers": 5}, f"{TRAINING}.model": {"layers": 4}},
        "must not exceed model.layers",
    ),
    Case("a container of an account", {f"{TRAINING}.checkpoint.uri": "abfs://runs@account.dfs.core.windows.net/a"}),
    Case("a port and an at sign", {f"{TRAINING}.data.train": ["https://host:8080/books@2/*.txt"]}),
    *(
        Case(f"a password in {field}", {f"{TRAINING}.{field}": value}, "a URI must not hold a password")
        for field, value in {
            "data.train": ["a.txt", "s3://key:secret@bucket/*.txt"],
            "data.heldOut": ["simplecache::https://me:secret@host/a"],
            "data.tokenizer": {"kind": "File", "uri": "ftp://me:secret@host/t.json"},
            "checkpoint.uri": "s3://key:secret@bucket",
            "checkpoint.restoreFrom.uri": "https://:secret@host/runs",
            "export.uri": "sftp://me:secret@host/e",
        }.items()
    ),
    Case("the newest of a run", {RESTORE: {"uri": "s3://b/runs/team/demo-5f3a9c1e/latest"}}),
    Case("a step of a run", {RESTORE: {"uri": "s3://b/runs/team/demo-5f3a9c1e", "step": 500}}),
    Case("one checkpoint", {RESTORE: {"uri": f"s3://b/runs/team/demo-5f3a9c1e/{CHECKPOINT}"}}),
    Case("a run called latest", {RESTORE: {"uri": "latest", "step": 500}}),
    Case("a step of the newest", {RESTORE: {"uri": "./runs/latest/", "step": 500}}, "names a checkpoint already"),
    Case("a step of a checkpoint", {RESTORE: {"uri": f"./{CHECKPOINT}", "step": 500}}, "names a checkpoint already"),
    Case("a failure rule by exit code", {"spec.failurePolicy.rules": [{"action": "Fail", "exitCodes": [1]}]}),
    Case("a failure rule by reason", {"spec.failurePolicy.rules": [{"action": "Fail", "podReasons": ["Evicted"]}]}),
    Case("a failure rule without selector", {"spec.failurePolicy.rules": [{"action": "Fail"}]}, "needs exitCodes or"),
    # An explicit null is a field that is not set
    Case("null for an optional number", {"spec.processesPerNode": None}),
    Case("null for an optional object", {f"{TRAINING}.checkpoint": None}),
    Case("null for the uri of bytes", {TOKENIZER: {"kind": "Bytes", "uri": None}}),
    Case("null for one of two durations", {f"{TRAINING}.schedule": {"steps": 1, "tokens": None}}),
    # The template is free, because the cluster's own version of a pod decides
    Case("any template", {"spec.template": {"spec": {"newFieldOfTomorrow": {"a": [1]}}}}),
]

IMMUTABLE: dict[Path, tuple[Any, Any]] = {
    "spec.nodes": (2, 4),
    "spec.gpusPerNode": (1, 2),
    "spec.processesPerNode": (1, 2),
    "spec.gpuResourceName": ("amd.com/gpu", "nvidia.com/gpu"),
    "spec.managedBy": ("example.com/other", names.MANAGED_BY),
    "spec.scheduling": ({"queueName": "a"}, {"queueName": "b"}),
    "spec.topology": ({"levels": ["a"]}, {"levels": ["a", "b"]}),
    "spec.training": (
        {"data": {"train": ["a"]}, "schedule": {"steps": 1}},
        {"data": {"train": ["a"]}, "schedule": {"steps": 2}},
    ),
}
"""Field, first value, and another valid value that must be refused."""

MUTABLE: dict[Path, tuple[Any, Any]] = {
    "spec.suspend": (False, True),
    "spec.image": ("a", "b"),
    "spec.template": ({}, {"metadata": {"labels": {"a": "b"}}}),
    "spec.activeDeadlineSeconds": (60, 120),
    "spec.ttlSecondsAfterFinished": (60, 120),
    "spec.checkpointTimeoutSeconds": (60, 120),
    "spec.failurePolicy": ({"maxRestarts": 1}, {"maxRestarts": 2}),
}
"""The rest of the spec: field, first value, and a value that it may take later."""
