"""Teachers: whatever says something about a batch, behind one call."""

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache.sampling import sample_logits
from hf_distill.teachers.cache.settings import label_log_probs
from hf_distill.teachers.cache.writer import cache_teacher
from hf_distill.teachers.cached import CachedTeacher
from hf_distill.teachers.ensemble import EnsembleTeacher, RoutedTeacher
from hf_distill.teachers.frozen import AdapterOffTeacher, FrozenTeacher, load_teacher
from hf_distill.teachers.gates import GatedKD
from hf_distill.teachers.generations import Generation
from hf_distill.teachers.local_text import LocalTextTeacher
from hf_distill.teachers.peer import EMATeacher, MutualKD, PeerTeacher
from hf_distill.teachers.privileged import PrivilegedTeacher, TeacherInputs, add_teacher_inputs
from hf_distill.teachers.relabelled import RelabelledTeacher
from hf_distill.teachers.remote import RemoteTeacher
from hf_distill.teachers.remote_text import RemoteTextTeacher
from hf_distill.teachers.text import TextTeacher
from hf_distill.teachers.usage import TeacherBudgetExceeded

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "GatedKD",
    "Generation",
    "LocalTextTeacher",
    "MutualKD",
    "PeerTeacher",
    "PrivilegedTeacher",
    "RelabelledTeacher",
    "RemoteTeacher",
    "RemoteTextTeacher",
    "RoutedTeacher",
    "Teacher",
    "TeacherBudgetExceeded",
    "TeacherInputs",
    "TextTeacher",
    "add_teacher_inputs",
    "cache_teacher",
    "label_log_probs",
    "load_teacher",
    "sample_logits",
]
