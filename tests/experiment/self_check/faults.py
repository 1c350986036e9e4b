"""The catalogue of silent faults, by which the self-check of a training is measured."""

from experiment.self_check import faults_data, faults_model, faults_objective, faults_rows, faults_state
from experiment.self_check.faults_injection import Fault

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for module in (faults_data, faults_rows, faults_model, faults_objective, faults_state)
    for fault in module.FAULTS
}
"""All faults by name."""
