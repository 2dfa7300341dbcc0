//! No frame costs an allocation, once every buffer has had its first use.

use super::*;
use crate::allocations::allocations_of;

#[test]
fn frames_are_carried_without_an_allocation() {
    for shape in Shape::all().filter(|shape| shape.late.is_none()) {
        let mut bed = Bed::new(&shape);
        for _ in 0..ROWS {
            bed.receive.add_buffers(1, 1);
        }
        let carry = |bed: &mut Bed| {
            let mut frame = vec![0x5a; 1500];
            frame[..6].copy_from_slice(&MAC);
            let mut come = 0;
            while bed.transmit.send(FrameHeader::default(), &frame, &[]) {}
            bed.publish();
            let mut allocated = 0;
            for _ in 0..100 {
                allocated += allocations_of(|| bed.turn()).1;
                while bed.receive.take().is_some() {
                    come += 1;
                    bed.receive.add_buffers(1, 1);
                }
                bed.transmit.reap();
                bed.publish();
            }
            (come, allocated)
        };
        for _ in 0..4 {
            carry(&mut bed);
        }
        let (come, allocated) = carry(&mut bed);
        assert!(come > 0 && allocated == 0, "{come} frames, {allocated} allocations; {shape:?}");
    }
}
