"""What a run tells of itself: metrics, trackers, goodput and charts."""
