"""Distillation: the step, its losses, and where the teacher's signals come from."""

from . import losses as losses
from ._cache_codec import Codec as Codec
from ._cached_teacher import CachedTeacher as CachedTeacher
from ._context import BatchItems as BatchItems
from ._context import LossValue as LossValue
from ._context import StepContext as StepContext
from ._distiller import Distiller as Distiller
from ._distiller import StepOutput as StepOutput
from ._graphed_step import GraphedTrainStep as GraphedTrainStep
from ._logit_terms import LabelCrossEntropy as LabelCrossEntropy
from ._logit_terms import Logits as Logits
from ._recorder import CudaRecorder as CudaRecorder
from ._recorder import Recorder as Recorder
from ._sample_ids import SAMPLE_IDS as SAMPLE_IDS
from ._sample_ids import with_sample_ids as with_sample_ids
from ._signal_terms import AttentionMapKL as AttentionMapKL
from ._signal_terms import AttentionScores as AttentionScores
from ._signal_terms import SignalMSE as SignalMSE
from ._teacher import LiveTeacher as LiveTeacher
from ._teacher import TeacherSource as TeacherSource
from ._terms import LossTerm as LossTerm
from ._train_step import TrainStep as TrainStep
