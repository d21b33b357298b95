"""What a run or a study will take, before anything is loaded: memory, communication, time, judge calls."""
