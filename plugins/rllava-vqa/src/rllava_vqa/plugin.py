"""What this package tells rllava: its data sets, environments and rewards, as data. Imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Visual question answering: data sets, rewards, and looking again before the answer.")


@hookimpl
def rllava_datasets() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="digits",
            target="rllava_vqa.datasets.digits:Digits",
            config="rllava_vqa.config:DigitsConfig",
            summary="1,797 scanned handwritten digits of 8x8 pixels, built in: nothing to download",
        ),
        ComponentSpec(
            name="digit_scenes",
            target="rllava_vqa.datasets.digit_scenes:DigitScenes",
            config="rllava_vqa.config:DigitScenesConfig",
            summary="1,797 scenes with one scanned digit each, which only a closer look can read; built in",
        ),
        ComponentSpec(
            name="jsonl",
            target="rllava_vqa.datasets.jsonl:JsonLines",
            config="rllava_vqa.config:JsonLinesConfig",
            summary="one JSON object a line: image paths, question, answer, boxes",
        ),
        ComponentSpec(
            name="folder",
            target="rllava_vqa.datasets.folder:ClassFolder",
            config="rllava_vqa.config:ClassFolderConfig",
            summary="a folder with one sub-folder of images for each answer",
        ),
    ]


@hookimpl
def rllava_environments() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="zoom",
            target="rllava_vqa.environments.zoom:Zoom",
            config="rllava_vqa.config:ZoomConfig",
            summary="an overview first; choose a region to see it in full resolution, or an answer",
            provides=frozenset({"choices"}),
            needs=frozenset({"dataset"}),
        ),
        ComponentSpec(
            name="zoom_text",
            target="rllava_vqa.environments.zoom_text:ZoomText",
            config="rllava_vqa.config:ZoomTextConfig",
            summary="an overview first; write which pixels to see in full resolution, or the answer",
            needs=frozenset({"dataset"}),
        ),
    ]


@hookimpl
def rllava_rewards() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="exact_match",
            target="rllava_vqa.rewards:ExactMatch",
            config="rllava_vqa.config:ExactMatchConfig",
            summary="1 if the answer is the example's answer",
        ),
        ComponentSpec(
            name="answer_format",
            target="rllava_vqa.rewards:AnswerFormat",
            config="rllava_vqa.config:AnswerFormatConfig",
            summary="1 if the whole answer matches a regular expression",
        ),
        ComponentSpec(
            name="contains",
            target="rllava_vqa.rewards:Contains",
            config="rllava_vqa.config:ContainsConfig",
            summary="1 if the example's answer occurs in the answer",
        ),
        ComponentSpec(
            name="numeric",
            target="rllava_vqa.rewards:Numeric",
            config="rllava_vqa.config:NumericConfig",
            summary="1 if the last number of the answer is the example's number",
        ),
    ]
