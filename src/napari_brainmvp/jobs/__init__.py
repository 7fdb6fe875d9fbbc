"""Background work: a folder for each job, a process of its own, a queue for each device. No torch here."""

from __future__ import annotations

from napari_brainmvp.jobs.control import free_name, remove_job, resume_job, stop_job, submit_job
from napari_brainmvp.jobs.job import Job, JobState, find_job, list_jobs, read_job, say_seconds
from napari_brainmvp.jobs.metrics import MetricsTable, left_out
from napari_brainmvp.jobs.queue import gpu_count
from napari_brainmvp.jobs.spec import KINDS, JobSpec, jobs_folder, training_job

__all__ = [
    "KINDS",
    "Job",
    "JobSpec",
    "JobState",
    "MetricsTable",
    "find_job",
    "free_name",
    "gpu_count",
    "jobs_folder",
    "left_out",
    "list_jobs",
    "read_job",
    "remove_job",
    "resume_job",
    "say_seconds",
    "stop_job",
    "submit_job",
    "training_job",
]
