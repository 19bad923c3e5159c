"""Guests of now that are answered from a recording, without handlers."""

from vmibridge.recording.answers.bridge import AnsweredFromRecording, RecordedAnswers
from vmibridge.recording.answers.load import load_answers

__all__ = ["AnsweredFromRecording", "RecordedAnswers", "load_answers"]
