"""The parts of scripts/bench_decode.py: what is asked, how it is measured, capacity, peers, tables and plots."""
