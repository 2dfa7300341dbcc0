//! vhost-user.
