//! A program of Linux that calls by CPUID, with buffers whose pages were never touched. Ends with 0
//! when what came back is right.
#![no_std]
#![no_main]

mod called;

use called::called as handler;
use called::Way;

const ROOM: usize = 20_000;

static mut OURS: [u8; ROOM + 8] = [0; ROOM + 8];
static mut THEIRS: [u8; ROOM + 8] = [0; ROOM + 8];

fn is_right() -> bool {
    // Nothing else has them.
    let (ours, theirs) = unsafe {
        let (ours, theirs) = (core::ptr::addr_of_mut!(OURS), core::ptr::addr_of_mut!(THEIRS));
        (&*ours, &mut *theirs)
    };
    handler::fill(&Way::Cpuid, 0x5a, &mut theirs[5..5 + ROOM]) == Ok(ROOM as u32)
        && theirs[4] == 0
        && theirs[5] == 0x5a
        && theirs[5 + ROOM - 1] == 0x5a
        && theirs[5 + ROOM] == 0
        && handler::total(&Way::Cpuid, 5, &ours[..ROOM]) == Ok(5)
}

#[no_mangle]
extern "C" fn begin() -> ! {
    let status = !is_right() as u64;
    loop {
        unsafe { core::arch::asm!("syscall", in("rax") 231_u64, in("rdi") status) }
    }
}

#[panic_handler]
fn panicked(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

core::arch::global_asm!(".globl _start", "_start:", "    and rsp, -16", "    call begin");
