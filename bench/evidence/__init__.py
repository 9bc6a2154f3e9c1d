"""What bench/study.py runs and reports: plan, trials, stages, outcomes, tables, figures."""
