"""The kinds of stages a recipe may name. To add one, write its package and add its line here."""

from stages.base import StageConfig
from stages.characteristics.config import CharacteristicsStage
from stages.dpo.config import DPOStage
from stages.judge.config import JudgeStage
from stages.lm_eval.config import LMEvalStage
from stages.push.config import PushStage
from stages.report.config import ReportStage
from stages.sensitivity.config import SensitivityStage
from stages.sft.config import SFTStage

KINDS: dict[str, type[StageConfig]] = {
    stage.kind: stage
    for stage in (
        SFTStage,
        DPOStage,
        LMEvalStage,
        JudgeStage,
        SensitivityStage,
        CharacteristicsStage,
        PushStage,
        ReportStage,
    )
}
