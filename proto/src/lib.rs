//! The control interface between the card and its clients.
